"""What a trainer needs from its run."""

from dataclasses import dataclass, field

from rorchat.training.callbacks.metrics import StartEvents
from rorchat.training.checkpointing.mirror import Mirror
from rorchat.training.checkpointing.resume_plan import ResumePlan
from rorchat.training.lora import Adapter


@dataclass(frozen=True)
class StageContext:
    """What a trainer needs from its run besides model, data and arguments. Created by `RunFolder.context`.

    Args:
        resume: what the run resumes from; by default nothing.
        details: recorded in run.json and in every checkpoint: the data, and the plan of a mixture.
        mirror: receives a copy of every checkpoint; on the main process.
        adapter: the LoRA adapter, if one is trained.
    """

    resume: ResumePlan = field(default_factory=lambda: ResumePlan({}))
    details: dict = field(default_factory=dict)
    mirror: Mirror | None = None
    adapter: Adapter | None = None

    def start_events(self) -> StartEvents:
        metadata = self.resume.metadata
        new_phase = metadata["inputs"]["mixture"]["sources"] if self.resume.appends_phase else ()
        return StartEvents(weights_only=self.resume.weights_only, new_phase=tuple(new_phase))
