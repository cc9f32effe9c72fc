"""Distillation: the student, its targets, and the command from teacher to checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iclevr.labels import ICLEVR
from shared.checkpoint import read_info
from shared.diffusion.denoise import sample
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.samplers import make_table
from shared.options import SamplingOptions
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
from trainer.errors import TrainerError
from trainer.objectives.distilled import Distilling, make_pool, make_student, trajectories

CPU = torch.device("cpu")
PATH = SamplingOptions(sampler="dpmpp_2m", steps=12, guidance=2.0)
INPUTS = 5


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.objectives.distilled.POOL_CHUNK", 2)


@pytest.fixture
def teacher(tmp_path: Path) -> Denoiser:
    publish_toys(tmp_path)
    return load_denoiser(tmp_path / "toy.safetensors")


def _inputs(teacher: Denoiser) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(INPUTS, *teacher.image_shape, generator=generator)
    labels = (torch.rand(INPUTS, len(teacher.vocabulary), generator=generator) < 0.2).float()
    return x, torch.tensor([0, 200, 500, 800, 999]), labels, torch.ones(INPUTS, dtype=torch.bool)


def test_a_student_starts_as_its_teacher_and_is_published_whole(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "placed", 0, positions=True, rotations=True)
    teacher, options = load_denoiser(tmp_path / "placed.safetensors"), SamplingOptions(sampler="ddim", steps=4)
    network = make_student(teacher, tmp_path)
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    with torch.no_grad():
        network.head.bias.add_(1.0)
    pool = trajectories(teacher, teacher.stepper(), torch.eye(len(teacher.vocabulary))[:1], [7], 2, PATH)
    path = Distilling(pool, teacher, options, CPU).publish(network, tmp_path, "fast", {"note": 1})
    (tmp_path / "placed.safetensors").unlink()  # it needs no other file
    loaded = load_denoiser(path)
    assert (loaded.options, loaded.info.training) == (options, {"note": 1})
    torch.testing.assert_close(loaded.network.head.bias, teacher.network.head.bias + 1.0, rtol=0.01, atol=0.01)
    assert not teacher.network.head.bias.equal(network.head.bias)
    assert loaded.layouts is not None
    assert teacher.layouts is not None
    for key, value in teacher.layouts.network.state_dict().items():
        torch.testing.assert_close(loaded.layouts.network.state_dict()[key], value, rtol=0.01, atol=0.01)


def test_the_teacher_passes_through_the_students_own_timesteps(teacher: Denoiser) -> None:
    """Rounded to whole timesteps, every 13th of 26 steps is one off the second of 2."""
    path = SamplingOptions(sampler="dpmpp_2m", steps=26, guidance=1.0)
    wanted = make_table(SamplingOptions(sampler="ddim", steps=2), teacher.alpha_bar).t
    assert make_table(path, teacher.alpha_bar).t[::13].tolist() != wanted.tolist()
    cut = trajectories(teacher, teacher.stepper(), torch.eye(len(teacher.vocabulary))[:1], [7], 2, path)
    assert cut["t"].tolist() == wanted.tolist()


@pytest.mark.parametrize("steps", [1, 4])
def test_one_step_of_the_student_ends_where_the_teachers_steps_end(teacher: Denoiser, steps: int) -> None:
    labels = torch.eye(len(teacher.vocabulary))[:3]
    cut = trajectories(teacher, teacher.stepper(), labels, [7, 8, 9], steps, PATH)
    ddim = make_table(SamplingOptions(sampler="ddim", steps=steps), teacher.alpha_bar)
    assert cut["t"].tolist() == [t for t in ddim.t.tolist() for _ in range(3)]
    ends = sample(teacher.stepper(), labels, PATH, [7, 8, 9])
    starts = [*cut["x"].float().split(3), ends]
    for k in range(steps):
        one_step = ddim.a[k] * starts[k] + ddim.b[k] * cut["x0"].float()[3 * k : 3 * k + 3]
        torch.testing.assert_close(one_step, starts[k + 1], rtol=0.01, atol=0.02)


def test_a_pool_resumes_where_it_stopped(teacher: Denoiser, tmp_path: Path) -> None:
    labels, stepped = torch.eye(len(teacher.vocabulary)), []
    options = SamplingOptions(sampler="ddim", steps=2, guidance=1.0)
    first = make_pool(tmp_path / "pool", teacher, labels, 3, 2, options, stepped.append)
    assert (len(first["t"]), stepped) == (8, [2, 2])
    kept = (tmp_path / "pool" / "00001.safetensors").stat().st_mtime_ns
    part = tmp_path / "pool" / "00000.safetensors"
    whole = part.read_bytes()
    for harm in (part.unlink, lambda: part.write_bytes(whole[:1000])):
        harm()
        again = make_pool(tmp_path / "pool", teacher, labels, 3, 2, options)
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert (tmp_path / "pool" / "00001.safetensors").stat().st_mtime_ns == kept


@pytest.fixture
def distil(command: Command, tmp_path: Path) -> Command:
    """Runs `train distilled` of the toys with a folder of four pictures, for one step."""
    data = write_data_folder(tmp_path / "data", pictures=4)
    publish_toys(tmp_path / "models")
    common = ["train", "distilled", "--data", data, "--set", "batch=4", "--steps", 1, "--trajectories", 4]
    return lambda *options: command(*common, "--name", "x", "--run", "run", *options)


def test_the_teacher_draws_the_folders_label_sets(distil: Command) -> None:
    names = json.loads(Path("data/train.json").read_text())
    lists = [["red cube"], ["blue cube"], [], []]
    Path("data/train.json").write_text(json.dumps(dict(zip(names, lists, strict=True))))
    write_objects_file(Path("data"), ICLEVR.names[::-1])
    succeeded(distil())
    chunks = [load_file(path)["labels"] for path in Path("run/pool").iterdir()]
    wanted = [ICLEVR.multi_hot(labels) for labels in (["blue cube"], ["red cube"])]
    assert torch.cat(chunks).unique(dim=0).tolist() == wanted
    Path("data/train.json").write_text(json.dumps(dict.fromkeys(names, ("red cube",))))
    Path("run/state.pt").unlink()  # as if it had been interrupted before its first step
    refused(distil(), r"setup\.json has another data; choose another folder")
    Path("data/train.json").write_text(json.dumps(dict.fromkeys(names, ())))
    refused(distil(), "none of the pictures has labels")


def test_the_command_from_teacher_to_few_steps(distil: Command) -> None:
    succeeded(distil("--name", "first"))
    assert read_info(Path("models/first.safetensors")).config["sampling"]["steps"] == 4
    refused(distil("--teacher", "other"), "run/setup.json has another teacher; choose another folder")
    few = ("--start-from", "first", "--run", "two", "--teacher-steps", 4, "--sampling-steps", 2)
    succeeded(distil("--name", "few", *few))
    info = read_info(Path("models/few.safetensors"))
    assert "base" not in info.config
    assert (info.training["method"], info.training["teacher"], info.training["steps"]) == ("trajectories", "toy", 1)
    assert load_denoiser(Path("models/few.safetensors")).options == SamplingOptions(
        sampler="ddim", steps=2, guidance=1.0
    )


def test_targets_are_clamped_as_the_sampling_loop_clamps(tmp_path: Path) -> None:
    """An eps prediction at cosine's noisiest timestep, where x0_hat would be thousands."""
    publish_toy_denoiser(tmp_path, "eps", 0, prediction="eps")
    teacher, labels = load_denoiser(tmp_path / "eps.safetensors"), torch.eye(len(ICLEVR))[:3]
    for steps, options in ((1, PATH), (3, SamplingOptions(sampler="ddim", steps=3, guidance=1.0))):
        cut = trajectories(teacher, teacher.stepper(), labels, [7, 8, 9], steps, options)
        noisiest = cut["t"] == 999
        assert float(cut["x0"][noisiest].abs().max()) <= 1
    assert float(cut["error"].max()) < 1e-4  # they take the same steps
    objective = Distilling(cut, teacher, options, CPU)
    drawn = objective.draw(torch.arange(9), slice(0, 9), torch.Generator())
    assert float(objective(teacher.network, *drawn).detach()) < 0.01


def test_a_run_starts_from_a_checkpoint_of_the_same_network(teacher: Denoiser, tmp_path: Path) -> None:
    start = load_denoiser(tmp_path / "other.safetensors")
    network = make_student(teacher, tmp_path, start_from="other")
    for key, value in start.network.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    publish_toy_denoiser(tmp_path, "placed", 0, positions=True)
    publish_toy_denoiser(tmp_path, "digits", 0, vocabulary=Vocabulary(("zero", "one")))
    for name in ("placed", "digits"):
        with pytest.raises(TrainerError, match=f"{name} is another network than toy"):
            make_student(teacher, tmp_path, start_from=name)


def test_what_cannot_be_distilled_is_refused_and_the_run_folder_stays_as_it_was(distil: Command) -> None:
    storage = Path("models")
    refused(distil("--set", "noise_levels=uniform"), "noise_levels: unknown; known are batch")
    refused(distil("--teacher-steps", 7), "must be a multiple of --sampling-steps 4")
    refused(distil("--teacher-steps", 4000), "steps: .*less than or equal to 1000, got 4000")
    publish_toy_evaluator(storage, "fewer", Vocabulary(ICLEVR.names[1:]))
    refused(distil("--evaluator", "fewer"), "fewer does not know the denoiser's labels gray cube;")
    refused(distil("--teacher", "toy", "--name", "toy"), "toy: is the checkpoint that the new one changes, so it mus")
    publish_toy_denoiser(storage, "digits", 0, vocabulary=Vocabulary(("zero", "one")))
    unknown = "digits does not know labels of the folder: gray cube, red cube, blue cube and 1 more"
    refused(distil("--teacher", "digits"), unknown)
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run/state.pt").write_bytes(b"of another objective")
    refused(distil(), "run holds the run of another objective; choose another --run")
    assert [path.name for path in Path("run").iterdir()] == ["state.pt"]
