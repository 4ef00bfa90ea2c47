"""From data, hours and a machine to a project's folder: `rorchat new`."""

from dataclasses import dataclass, replace
from pathlib import Path

from rorchat.device import Device, detect_device
from rorchat.errors import MismatchError, UsageError
from rorchat.inference.engine import resolve_model_path
from rorchat.model import Shape, count_parameters
from rorchat.persona import load_persona
from rorchat.plan.budget import Request as PlanRequest
from rorchat.plan.budget import make_plan
from rorchat.plan.scaling import format_size
from rorchat.plan.show import format_count, format_duration
from rorchat.project.files import ProjectFiles, choose_names, require_new
from rorchat.project.resources import describe_resources
from rorchat.project.schedule import Base, Schedule, Scheduler
from rorchat.project.settings import ProjectSettings
from rorchat.project.sizing import Size
from rorchat.project.survey import SAMPLE_CHARACTERS, SourceSurvey, Survey, count_bytes, survey_sources, take_sample
from rorchat.project.timing import measure_machine, measure_seconds_per_token
from rorchat.project.vocabulary import Sample, Vocabulary, measure_bytes_per_token, try_vocabularies
from rorchat.training.gpu import warn_about_unusable_gpu

MIN_HOURS = 0.05  # below, the starts of the commands take most of the time
BLOCK_SIZES = {True: (256, 512), False: (512, 1024)}  # {is_cpu: rows to choose from, in tokens}
TYPICAL_BYTES_PER_TOKEN = 3.0  # before a tokenizer has been tried
BASE_SAMPLE = 200_000  # characters that the tokenizer of a model to start from is tried on
SYSTEM_TOKENS = 60  # system message and template of a conversation
GPT2, RANDOM = "gpt2", "random"  # values of `--from`
TOKENS_FOR_GPT2 = 2.5e9  # 20 for each of its 124M parameters (Hoffmann et al. 2022, arXiv:2203.15556)
MANY_EPOCHS = 3.0  # passes over the documents, beyond which more text helps more than more time
NOTABLE = 0.01  # bits per byte
EARLY = 0.9  # share of the time, below which a note says that it is not all used


@dataclass(frozen=True)
class NewProject:
    """A project that has been written.

    Attributes:
        notes: what limits the model, what would make it better, and the memory and disk that it needs.
    """

    folder: Path
    settings: ProjectSettings
    notes: list[str]

    @property
    def schedule(self) -> Schedule:
        return self.settings.schedule

    @property
    def survey(self) -> Survey:
        return self.settings.survey

    def source_rows(self) -> list[list[str]]:
        """Rows of a table of the sources."""
        rows = []
        for source in self.survey.sources:
            rejected = sum(source.stats.rejects.values())
            language = f"{source.language}, {source.language_share:.0%} of rows" if source.language else "-"
            rows.append(
                [
                    source.spec + (" (added)" if source.is_added else ""),
                    source.option,
                    f"{source.rows:,}" + (f" of {source.rows + rejected:,}" if rejected else ""),
                    f"{format_count(source.utf8_bytes)}B",
                    language,
                    source.stats.licence or "-",
                ]
            )
        return rows

    def describe_reading(self) -> list[str]:
        """For each of the user's sources: rows, files and their encodings, what was not read, and who is the user."""
        return [str(source.stats) for source in self.survey.sources if not source.is_added]

    def stage_rows(self) -> list[list[str]]:
        """Rows of a table of the commands: name, time, what it does."""
        commands = ProjectFiles(self.folder, self.settings, None).commands()
        tokens = self.schedule.tokens
        rows = [
            [
                name,
                format_duration(self.schedule.seconds.get(name, 0.0) / 3600),
                f"{format_count(tokens[name])} tokens" if name in tokens else "",
                command,
            ]
            for name, command in commands.items()
        ]
        asked = f"asked for: {format_duration(self.settings.scheduler.hours)}"
        return [*rows, ["total", format_duration(self.schedule.total_seconds / 3600), "", asked]]


def create_project(
    folder: Path,
    *,
    documents: list[str],
    conversations: list[str],
    preferences: list[str],
    hours: float,
    persona: Path | None = None,
    base: str | None = None,
) -> NewProject:
    """Reads the data, measures the machine, plans a model for the time, and writes the project's folder.

    Args:
        documents, conversations, preferences: specs or paths; at least one of them in total.
        persona: a persona file; None to write one that the user can edit.
        base: a chat or base model, or a Hub id such as "gpt2", to start from; "random" for random weights; None for
            whichever is better: see `prefers_gpt2`.

    Raises:
        UsageError: there is no data, the time is too short, the folder is not empty, or a source has the wrong kind.
        DataError: a path does not exist, or a source has no usable row.
    """
    given = {"documents": documents, "conversations": conversations, "preferences": preferences}
    if not any(given.values()):
        raise UsageError("No data: give --documents, --conversations or --preferences, each a file, folder or source.")
    if not MIN_HOURS <= hours < float("inf"):
        raise UsageError(f"--hours is {hours:g}: give at least {MIN_HOURS} ({MIN_HOURS * 60:.0f} minutes).")
    require_new(folder)
    warn_about_unusable_gpu()
    loaded_persona = load_persona(persona)
    base = base or (GPT2 if prefers_gpt2(detect_device(), hours) else RANDOM)
    survey = survey_sources(given, loaded_persona, from_scratch=base == RANDOM)
    from_model = None if base == RANDOM else _describe_base(base, survey)
    machine = measure_machine(_choose_block_size(survey, from_model))
    scheduler = Scheduler(survey, machine, hours, from_model)
    if from_model:
        vocabularies = [from_model.vocabulary]
    else:
        vocabularies = try_vocabularies(_sample(survey.pretraining), _sample(survey.of("conversations")))
    scheduler, schedule = _choose(scheduler, vocabularies)
    settings = ProjectSettings(scheduler, schedule)
    notes = [*write_notes(scheduler, schedule, vocabularies), describe_resources(scheduler, schedule, folder)]
    if persona is None:
        name, maker = choose_names(folder)
        notes.append(f"The model will call itself {name}, made by {maker}: change it in {folder / 'persona.yaml'}.")
    ProjectFiles(folder, settings, persona).write()
    return NewProject(folder, settings, notes)


def _sample(sources: list[SourceSurvey]) -> Sample:
    size = count_bytes(sources)
    return Sample(take_sample(sources), size, is_all=size <= SAMPLE_CHARACTERS)


def prefers_gpt2(device: Device, hours: float) -> bool:
    """Whether fine-tuning GPT-2's checkpoint gives a better model than training one from random weights.

    That is so on a GPU that cannot read TOKENS_FOR_GPT2 tokens in this time. On a CPU, fine-tuning 124M parameters
    takes longer than training a small model from random weights.
    """
    if device.is_cpu:
        return False
    plan = make_plan(PlanRequest(device, tokens=TOKENS_FOR_GPT2, size="124m"))
    return plan.hours > hours


def _choose(scheduler: Scheduler, vocabularies: list[Vocabulary]) -> tuple[Scheduler, Schedule]:
    """Chooses the size at interpolated speeds, measures the chosen one, and plans with the measurement."""
    if scheduler.base:
        shape, vocabulary = scheduler.base.shape, scheduler.base.vocabulary
    else:
        size = scheduler.choose(vocabularies)
        shape, vocabulary = size.shape, size.vocabulary
    machine = scheduler.machine
    seconds = measure_seconds_per_token(
        machine.device, shape, vocabulary.size, machine.block_size, optimizer=scheduler.optimizer
    )
    scheduler = replace(scheduler, measured={(shape, vocabulary.size): seconds / machine.gpus})
    return scheduler, scheduler.schedule(shape, vocabulary)


def _choose_block_size(survey: Survey, base: Base | None) -> int:
    """The smallest row that holds nine of ten conversations."""
    positions = base.positions if base else max(max(sizes) for sizes in BLOCK_SIZES.values())
    allowed = [min(size, positions) for size in BLOCK_SIZES[detect_device().is_cpu]]
    longest = max(source.lengths[1] for source in survey.of("conversations"))
    needed = longest / TYPICAL_BYTES_PER_TOKEN + SYSTEM_TOKENS
    return next((size for size in allowed if size >= needed), allowed[-1])


def _describe_base(name: str, survey: Survey) -> Base:
    """Shape, tokenizer and window of the model to start from."""
    from transformers import AutoConfig

    from rorchat.tokenizer import load_tokenizer

    path = resolve_model_path(name)
    tokenizer = load_tokenizer(path)
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "gpt2":
        raise MismatchError(f"--from {name} is a {config.model_type} model: only GPT-2 models can be trained here.")
    resolved = str(Path(path).resolve()) if Path(path).is_dir() else name
    shape = Shape(config.n_layer, config.n_head, config.n_embd)
    samples = (take_sample(survey.pretraining), take_sample(survey.of("conversations")))
    vocabulary = Vocabulary(
        len(tokenizer), *(measure_bytes_per_token(tokenizer, text[:BASE_SAMPLE]) for text in samples)
    )
    return Base(resolved, shape, vocabulary, config.n_positions)


def write_notes(scheduler: Scheduler, schedule: Schedule, vocabularies: list[Vocabulary]) -> list[str]:
    """What limits the model, with figures, and what would make it better."""
    survey, size = scheduler.survey, schedule.size
    notes = []
    for source in survey.sources:
        if source.is_added and not source.is_about_persona:
            notes.append(f"Generated {source.option} are added ({source.spec}): {_why_added(source, survey)}.")
    block_size = scheduler.machine.block_size
    notes += warn_about_long_rows(survey, block_size, size.vocabulary.chat_bytes_per_token)
    if scheduler.base:
        return notes
    if survey.pretraining != survey.of("documents"):
        notes.append("Pretraining reads the conversations as well, because you gave no documents, which add knowledge.")
    tokens = scheduler.count_tokens("documents", size.vocabulary)
    parameters = format_count(count_parameters(size.shape, size.vocabulary.size, block_size))
    if size.epochs > MANY_EPOCHS:
        notes.append(
            f"Little text: {format_count(tokens)} tokens, which this model of {parameters} parameters reads "
            f"{size.epochs:.0f} times, so it will repeat parts of them. "
            + _with_more_text(scheduler, vocabularies, size)
        )
    if schedule.total_seconds < EARLY * scheduler.hours * 3600:
        notes.append(
            f"The plan takes {format_duration(schedule.total_seconds / 3600)} of the "
            f"{format_duration(scheduler.hours)}: more passes over this text would make the model worse."
        )
        return notes
    longer = replace(scheduler, hours=2 * scheduler.hours)
    better = longer.choose(vocabularies)
    if size.bits_per_byte - better.bits_per_byte >= NOTABLE:
        notes.append(
            f"Twice the time: {format_size(better.shape)} with {better.vocabulary.size:,} tokens, predicted "
            f"{better.bits_per_byte:.2f} instead of {size.bits_per_byte:.2f} bits per byte."
        )
    if size.epochs <= MANY_EPOCHS:
        notes.append(_with_more_text(scheduler, vocabularies, size))
    return notes


def warn_about_long_rows(survey: Survey, block_size: int, bytes_per_token: float) -> list[str]:
    """One line for each source of chats whose 90th percentile does not fit into the window of the model."""
    effects = {
        "conversations": "their last turns are left out, or the whole conversation if its first reply does not fit",
        "preferences": "the earlier turns of their prompts are dropped, and their replies cut",
    }
    notes = []
    for option, effect in effects.items():
        for source in survey.of(option):
            median, ninety, _ = (length / bytes_per_token for length in source.lengths)
            share = "half" if median > block_size else "a tenth" if ninety > block_size else ""
            if share:
                notes.append(
                    f"More than {share} of the {option} of {source.spec} exceed {block_size} tokens: {effect}."
                )
    return notes


def _why_added(source: SourceSurvey, survey: Survey) -> str:
    """The reason for an added source: none were given, or too little text."""
    given = sum(other.utf8_bytes for other in survey.of(source.option) if not other.is_added)
    return f"yours have only {format_count(given)} bytes of text" if given else "none were given"


def _with_more_text(scheduler: Scheduler, vocabularies: list[Vocabulary], size: Size) -> str:
    more = replace(scheduler, document_bytes=4 * scheduler.text_bytes).choose(vocabularies)
    if size.bits_per_byte - more.bits_per_byte < NOTABLE:
        return "More text of this kind would not help in this time."
    return (
        f"Four times the text in the same time: predicted {more.bits_per_byte:.2f} instead of "
        f"{size.bits_per_byte:.2f} bits per byte."
    )
