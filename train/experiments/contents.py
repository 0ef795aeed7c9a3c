"""What a report contains, from top to bottom."""

from collections.abc import Callable, Sequence

from conf.wording import plural
from train.experiments.document import Section
from train.experiments.experiment import Experiment, experiment_of
from train.experiments.page import Report
from train.experiments.result import Result, Unread
from train.experiments.sections.ablations import ablations
from train.experiments.sections.answer import answer
from train.experiments.sections.costs import costs
from train.experiments.sections.curves import curves
from train.experiments.sections.equal import equal
from train.experiments.sections.final import final
from train.experiments.sections.learning_rate import learning_rate
from train.experiments.sections.scaling import scaling
from train.experiments.sections.settings import settings
from train.experiments.sections.tasks import tasks
from train.experiments.sections.unfinished import unfinished

SECTIONS: tuple[Callable[[Experiment], Section | None], ...] = (
    answer,
    equal,
    final,
    curves,
    costs,
    ablations,
    learning_rate,
    scaling,
    tasks,
    settings,
    unfinished,
)
"""Each says what it has to say of an experiment; None where the question makes no sense. Where
something was not measured, a section says so, and with which command it is."""


def report_of(results: Sequence[Result], title: str, unread: Sequence[Unread] = ()) -> Report:
    """The report of some runs, of which there is at least one.

    Args:
        unread: runs that cannot be read, which it names.
    """
    experiment = experiment_of(results, unread)
    found = [section(experiment) for section in SECTIONS]
    groups = plural(len(experiment.groups), "group")
    finished = sum(result.status == "finished" for result in results)
    runs = f"{plural(len(results), 'run')}, of which {finished} finished"
    subject = f"{runs}: {groups} that differ in more than their seed"
    if lost := sum(not run.kept for run in unread):
        subject += f"; {plural(lost, 'further run')} cannot be read"
    return Report(title, subject, tuple(section for section in found if section))
