"""What size, data and copies bring, as laws that are fitted to the losses at the end."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from train.experiments.document import Block, Fold, Note, Section, missing
from train.experiments.experiment import Experiment
from train.experiments.fits.choice import Choice, over_size_and_data, with_copies
from train.experiments.fits.families import Family, families, points_of, variants
from train.experiments.fits.fit import Fitted
from train.experiments.fits.points import Points
from train.experiments.sections import scaling_tables
from train.experiments.sections.scaling_charts import law_chart, phi_chart

MORE_RUNS = (
    "`python train/main.py -m +sweep=ladder train.max_tokens_per_parameter=5,20,80` runs sizes and "
    "lengths to which a law over both can be fitted; with `model=vanilla,phd_cswa`, phi as well."
)

Asked = list[tuple[Family, Choice]]


def scaling(experiment: Experiment) -> Section | None:
    """Fitted laws, phi, and what copies are worth; where runs do not bear one, what they lack."""
    runs = [run for group in experiment.groups for run in group.runs]
    if not runs:
        return None
    over_both = _ask(variants(runs, experiment.text_of), over_size_and_data, experiment)
    of_copies = _ask(families(runs, experiment.text_of), with_copies, experiment)
    laws, phis = _fits(over_both), _fits(of_copies)
    blocks: list[Block] = []
    if phis:
        blocks += [
            _phi(phis),
            phi_chart(phis, experiment),
            scaling_tables.equivalent(phis, experiment),
        ]
    if laws:
        blocks += [law_chart(laws, experiment), scaling_tables.laws([*laws, *phis], experiment)]
    elif phis:
        blocks.append(scaling_tables.laws(phis, experiment))
    blocks += _lacking("law over size and data", over_both) + _lacking("phi", of_copies)
    if any(choice.refused for _, choice in [*over_both, *of_copies]):
        blocks.append(missing(MORE_RUNS))
    if laws or phis:
        blocks.append(
            Fold("The constants in full", scaling_tables.constants([*laws, *phis], experiment))
        )
        blocks.append(
            Fold("The runs and the laws", scaling_tables.points([*laws, *phis], experiment))
        )
    return Section("scaling", "What size, data and copies bring", tuple(blocks))


def _ask(found: Iterable[Family], law: Callable[[Points], Choice], experiment: Experiment) -> Asked:
    measure = experiment.measure.of
    return [(family, law(points_of(family.runs, measure))) for family in found]


def _fits(asked: Asked) -> list[Fitted]:
    return [Fitted(family.label, choice.fit) for family, choice in asked if choice.fit]


def _phi(fits: Sequence[Fitted]) -> Note:
    sentences = []
    for label, fit in fits:
        phi = fit.interval("phi")
        sentences.append(
            f"{label}: phi = {phi.value:.2f} [{phi.low:.2f}, {phi.high:.2f}]. Two copies of "
            f"each token count as {2.0**phi.value:.2f} times the parameters of the blocks."
        )
    meaning = (
        "With phi = 0 further copies are worth nothing, with phi = 1 as much as parameters, and "
        "below 0 they harm."
    )
    return Note((meaning,), bullets=tuple(sentences))


def _lacking(what: str, asked: Asked) -> list[Block]:
    """What is lacking, once for all families that lack the same."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for family, choice in asked:
        if choice.refused:
            alike[choice.refused.reasons].append(family.label)
    return [
        missing(f"No {what} is fitted for {'; '.join(labels)}. {' '.join(reasons)}")
        for reasons, labels in alike.items()
    ]
