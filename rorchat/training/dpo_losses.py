"""The losses of preference training that TRL computes, and the settings that act with them."""

import math

from rorchat.errors import UsageError, did_you_mean
from rorchat.training.option_checks import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Effect,
    Rule,
    any_of,
    one_of,
)

#: The values that TRL 1.16 supports. It rejects others only after loading the model, or in the first step.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
LOSSES_OF_PAIRS = tuple(kind for kind in LOSSES if kind != "sft")
#: Losses of the difference between chosen and rejected replies, which support every divergence.
DIFFERENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
#: Losses with a term for a wrong preference. The others ignore `label_smoothing`.
SMOOTHED_LOSSES = ("exo_pair", "robust", "aot", "aot_unpaired")
RULES = {
    "chosen_drop": Rule(NOT_NEGATIVE.allows, "a number of nats per token, or 0 to disable it"),
    "beta": POSITIVE,
    "label_smoothing": Rule(lambda value: 0 <= value < 0.5, "a number from 0 to below 0.5"),
    "ld_alpha": SHARE,
    "f_divergence_type": one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "f_alpha_divergence_coef": FINITE,
    "discopop_tau": POSITIVE,
    "precompute_ref_batch_size": POSITIVE,
}
LOSS_EFFECTS = (
    Effect("label_smoothing", "loss_type", any_of(*SMOOTHED_LOSSES)),
    *(Effect(name, "loss_type", any_of(*LOSSES_OF_PAIRS)) for name in ("beta", "ld_alpha")),
    Effect("discopop_tau", "loss_type", any_of("discopop")),
    Effect("f_divergence_type", "loss_type", any_of(*DIFFERENCE_LOSSES)),
    Effect("f_alpha_divergence_coef", "f_divergence_type", one_of("alpha_divergence")),
)


def check_losses(arguments) -> None:
    """Raises UsageError if the losses, their weights and their settings do not fit together.

    Args:
        arguments: `DPOArguments`; missing weights are set to 1.
    """
    kinds = arguments.loss_type
    for kind in kinds:
        if kind not in LOSSES:
            raise UsageError(f"No loss_type {kind!r}.{did_you_mean(kind, LOSSES)} Available: {', '.join(LOSSES)}.")
    arguments.loss_weights = arguments.loss_weights or [1.0] * len(kinds)
    if len(arguments.loss_weights) != len(kinds):
        raise UsageError(
            f"loss_weights has {len(arguments.loss_weights)} numbers for {len(kinds)} losses ({', '.join(kinds)}): "
            "give one number for each, or omit it for equal weights."
        )
    if not all(0 <= weight < math.inf for weight in arguments.loss_weights) or not any(arguments.loss_weights):
        raise UsageError(f"loss_weights is {arguments.loss_weights}: give non-negative numbers, not all of them 0.")
    if "exo_pair" in kinds and not arguments.label_smoothing:
        raise UsageError(
            "loss_type exo_pair needs the logarithm of label_smoothing: give a positive one, such as 1e-3."
        )
    others = [kind for kind in kinds if kind not in (*DIFFERENCE_LOSSES, "sft")]
    if arguments.f_divergence_type != "reverse_kl" and others:
        raise UsageError(
            f"loss_type {others[0]} needs reverse_kl: leave out f_divergence_type {arguments.f_divergence_type}."
        )
