"""A batch of 32 pictures by the course report's sampler, diffusers and ours: `python -m benchmarks.sections.sampling`.

All use the same weights and take turns. The slow ones run only some of their steps; their time is scaled to all steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import subject
from benchmarks.baselines.samplers import LabelPipeline, ReportSampler, pipeline
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.timing import Deadline, figure, in_turn, paired
from shared.device import autocast_dtype
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.model import Denoiser
from shared.options import SamplingOptions

STEPS, GUIDANCE = 16, 3.0
SOLVER = "DPM-Solver++"  # of diffusers and, at the same steps, of ours
REPORT_STEPS = 999
TURNS_S = 120.0  # limit of the rounds; a slow machine does fewer
OURS, DISTILLED = "ours, as the checkpoint is served", "ours, distilled into one step"
OUR_SOLVER = f"ours, {SOLVER}"
REPORT = "the course report's sampler, fp32"


@dataclass(frozen=True)
class Way:
    """A way to sample the batch: `work` runs `measured` of its `steps`."""

    work: Callable[[], object]
    steps: int
    measured: int


def our_samplings(ours: Denoiser, distilled: Denoiser) -> dict[str, tuple[Stepper, SamplingOptions]]:
    """Return the stepper and options of each of our ways."""
    stepper, guided = ours.stepper(), SamplingOptions(sampler="dpmpp_2m", steps=STEPS, guidance=GUIDANCE)
    found = {OURS: (stepper, ours.options), DISTILLED: (distilled.stepper(), distilled.options)}
    return found | {OUR_SOLVER: (stepper, guided)}


def our_ways(samplings: dict[str, tuple[Stepper, SamplingOptions]], hot: Tensor) -> dict[str, Way]:
    def way(stepper: Stepper, options: SamplingOptions) -> Way:
        return Way(lambda: sample(stepper, hot, options, subject.seeds(len(hot))), options.steps, options.steps)

    return {name: way(*chosen) for name, chosen in samplings.items()}


def diffusers_ways(pipelines: dict[str, LabelPipeline], hot: Tensor, measured: dict[str, int]) -> dict[str, Way]:
    def way(pipe: LabelPipeline, only: int) -> Way:
        return Way(lambda: pipe(hot, STEPS, GUIDANCE, torch.Generator().manual_seed(0), only), STEPS, only)

    return {name: way(pipe, measured[name]) for name, pipe in pipelines.items()}


def make_pipelines(ours: Denoiser) -> dict[str, LabelPipeline]:
    words = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {f"diffusers, {SOLVER}, {word}": pipeline(ours, SOLVER, dtype) for word, dtype in words.items()}


def report_way(ours: Denoiser, hot: Tensor, only: int) -> Way:
    sampler = ReportSampler(ours.network, ours.alpha_bar, ours.prediction, ours.image_shape)
    return Way(lambda: sampler(hot, GUIDANCE, torch.Generator().manual_seed(0), only), REPORT_STEPS, only)


def measure(quick: bool) -> Data:
    count, rounds = (4, 2) if quick else (32, 3)
    slow = 1 if quick else 2
    ours = subject.in_steps()
    hot = subject.multi_hot(subject.label_lists(count), ours.vocabulary)
    pipelines, samplings = make_pipelines(ours), our_samplings(ours, subject.distilled())
    labels = subject.network_labels(samplings[OURS][0], hot)  # baselines get the positions that our loop draws
    # without instructions for bf16, a CPU takes even longer for it than for fp32
    slow_words = "fp32" if autocast_dtype(torch.device("cpu")) else ("fp32", "bf16")
    measured = {name: slow if name.endswith(slow_words) or quick else STEPS for name in pipelines}
    ways = our_ways(samplings, hot) | diffusers_ways(pipelines, labels, measured)
    ways |= {REPORT: report_way(ours, labels, slow)}
    say(f"  {len(ways)} ways to sample {count} pictures take turns, up to {rounds} rounds")
    times = in_turn({name: way.work for name, way in ways.items()}, rounds, deadline=Deadline(TURNS_S))
    whole = {name: [s * ways[name].steps / ways[name].measured for s in times[name]] for name in ways}
    rates = {name: figure(count / s for s in found) for name, found in whole.items()}
    our_solver, theirs = whole[OUR_SOLVER], f"diffusers, {SOLVER}"
    return {
        "figures": {
            "sampling.pictures_per_s": rates[OURS],
            "sampling.speedup_vs_report": paired(whole[REPORT], whole[OURS]),
            "sampling.speedup_vs_report_distilled": paired(whole[REPORT], whole[DISTILLED]),
            "sampling.speedup_vs_report_guided_16_steps": paired(whole[REPORT], our_solver),
            "sampling.speedup_vs_diffusers_fp32": paired(whole[f"{theirs}, fp32"], our_solver),
            "sampling.speedup_vs_diffusers_bf16": paired(whole[f"{theirs}, bf16"], our_solver),
        },
        "count": count,
        "served": ours.options.model_dump(mode="json"),
        "rates": rates,
        "steps": {name: way.steps for name, way in ways.items()},
        "measured": {name: way.measured for name, way in ways.items()},
    }


def report(data: Data) -> list[Piece]:
    served = data["served"]
    table = Table(["way", "steps", "pictures/s"])
    for name, rate in data["rates"].items():
        scaled = "" if data["measured"][name] == data["steps"][name] else f" ({data['measured'][name]} measured)"
        table.add(name, f"{data['steps'][name]}{scaled}", number(rate["median"]))
    return [
        f"{data['count']} pictures, the same weights and schedule, guidance {GUIDANCE:g} but as served: "
        f"{served['sampler']}, {served['steps']} steps, guidance {served['guidance']:g}. diffusers runs its own loop "
        "on the same network; fp32 is its default. The speed-ups above are of the served sampling over the report's, "
        "and of DPM-Solver++ over diffusers'. How good the pictures are is in the [results](results.md).",
        table,
    ]


if __name__ == "__main__":
    main("sampling", __doc__, measure)
