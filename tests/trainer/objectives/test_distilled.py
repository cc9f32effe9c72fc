"""Distillation: the adapter, its targets, and the command from teacher to checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.checkpoint import CheckpointError, load, publish, read_info
from shared.diffusion.denoise import sample
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.samplers import make_table
from shared.evaluator import Evaluator
from shared.options import SamplingOptions
from shared.registry import promote
from shared.vocabulary import ICLEVR, Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
from trainer.errors import TrainerError
from trainer.objectives.distilled import (
    AdaptedNetwork,
    Distilling,
    make_pool,
    make_student,
    publish_adapter,
    trajectories,
)
from trainer.objectives.evaluator import publish_evaluator

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


def _changed(teacher: Denoiser) -> AdaptedNetwork:
    network = AdaptedNetwork(teacher.network, rank=2)
    with torch.no_grad():
        for parameter in network.changes.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


@torch.inference_mode()
def test_an_adapter_starts_as_the_network_and_is_small(teacher: Denoiser) -> None:
    network = AdaptedNetwork(teacher.network, rank=2)
    torch.testing.assert_close(network(*_inputs(teacher)), teacher.network(*_inputs(teacher)))
    trained, frozen = (sum(p.numel() for p in module.parameters()) for module in (network, teacher.network))
    assert 4 * trained < frozen
    assert all(name.startswith("changes.") for name in network.state_dict())


@torch.inference_mode()
def test_a_published_adapter_is_the_network_that_was_trained(teacher: Denoiser, tmp_path: Path) -> None:
    network, options = _changed(teacher), SamplingOptions(sampler="ddim", steps=4, guidance=1.0)
    path = publish_adapter(network, teacher.info, tmp_path, "fast", options, {"note": 1})
    loaded = load_denoiser(path)
    assert (loaded.options, loaded.info.training) == (options, {"note": 1})
    assert path.stat().st_size < (tmp_path / "toy.safetensors").stat().st_size
    wanted, plain = network(*_inputs(teacher)), teacher.network(*_inputs(teacher))
    error = (loaded.network(*_inputs(teacher)) - wanted).abs().max()
    assert error < 0.02 * (plain - wanted).abs().max()
    again = AdaptedNetwork(teacher.network, rank=2, start=load(path)[1])
    torch.testing.assert_close(again(*_inputs(teacher)), loaded.network(*_inputs(teacher)))


def test_an_adapter_is_refused_without_the_weights_it_changes(teacher: Denoiser, tmp_path: Path) -> None:
    path = publish_adapter(AdaptedNetwork(teacher.network, rank=2), teacher.info, tmp_path, "fast", PATH, {})
    info, weights = load(tmp_path / "other.safetensors")
    publish(tmp_path, "toy", weights, kind="denoiser", vocabulary=info.vocabulary, config=info.config, training={})
    for use in (lambda: load_denoiser(path), lambda: promote(tmp_path, "fast")):
        with pytest.raises(
            CheckpointError, match=r"changes toy of digest \w{16}, but toy now has \w{16}; distil it again"
        ):
            use()
    (tmp_path / "toy.safetensors").unlink()
    for use in (lambda: load_denoiser(path), lambda: promote(tmp_path, "fast")):
        with pytest.raises(CheckpointError, match=r"changes toy, which cannot be loaded: cannot be read"):
            use()


@pytest.mark.parametrize("steps", [1, 4])
def test_one_step_of_the_student_ends_where_the_teachers_steps_end(teacher: Denoiser, steps: int) -> None:
    labels = torch.eye(len(teacher.vocabulary))[:3]
    cut = trajectories(teacher, teacher.stepper(), labels, [7, 8, 9], steps, PATH)
    assert {key: tuple(value.shape[:1]) for key, value in cut.items()} == dict.fromkeys(cut, (3 * steps,))
    ddim = make_table(SamplingOptions(sampler="ddim", steps=steps), teacher.alpha_bar)
    assert cut["t"].tolist() == [t for t in ddim.t.tolist() for _ in range(3)]
    ends = sample(teacher.stepper(), labels, PATH, [7, 8, 9])
    starts = [*cut["x"].float().split(3), ends]
    for k in range(steps):
        one_step = ddim.a[k] * starts[k] + ddim.b[k] * cut["x0"].float()[3 * k : 3 * k + 3]
        torch.testing.assert_close(one_step, starts[k + 1], rtol=0.01, atol=0.02)


def test_the_error_is_zero_where_student_and_teacher_take_the_same_steps(teacher: Denoiser) -> None:
    options = SamplingOptions(sampler="ddim", steps=3, guidance=1.0)
    labels = torch.eye(len(teacher.vocabulary))[:4]
    cut = trajectories(teacher, teacher.stepper(), labels, [1, 2, 3, 4], 3, options)
    assert float(cut["error"].max()) < 1e-6
    objective = Distilling(cut, teacher, teacher.info, options, CPU)
    drawn = objective.draw(torch.arange(12), slice(0, 12), torch.Generator())
    assert float(objective(teacher.network, *drawn).detach()) < 1e-3


def test_a_pool_resumes_where_it_stopped(teacher: Denoiser, tmp_path: Path) -> None:
    labels, stepped = torch.eye(len(teacher.vocabulary)), []
    options = SamplingOptions(sampler="ddim", steps=2, guidance=1.0)
    first = make_pool(tmp_path / "pool", teacher, labels, 3, 2, options, stepped.append)
    assert (len(first["t"]), stepped) == (8, [2, 2])
    kept = (tmp_path / "pool" / "00001.safetensors").stat().st_mtime_ns
    part = tmp_path / "pool" / "00000.safetensors"
    whole = part.read_bytes()
    for harm in (part.unlink, lambda: part.write_bytes(whole[:1000]), lambda: part.write_bytes(b"")):
        harm()
        again = make_pool(tmp_path / "pool", teacher, labels, 3, 2, options)
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert (tmp_path / "pool" / "00001.safetensors").stat().st_mtime_ns == kept


def test_the_teacher_draws_the_folders_label_sets(command: Command, tmp_path: Path) -> None:
    data, storage = write_data_folder(tmp_path / "data", pictures=4), tmp_path / "models"
    publish_toys(storage)
    names = json.loads((data / "train.json").read_text())
    lists = [["red cube"], ["blue cube"], [], []]
    (data / "train.json").write_text(json.dumps(dict(zip(names, lists, strict=True))))
    write_objects_file(data, ICLEVR.names[::-1])
    command_line = [
        "train", "distilled", "--data", data, "--storage", storage, "--name", "x", "--steps", 1, "--trajectories", 1,
        "--set", "batch=4", "--run", tmp_path / "run",
    ]  # fmt: skip
    succeeded(command(*command_line))
    drawn = load_file(tmp_path / "run/pool/00000.safetensors")["labels"].unique(dim=0)
    assert drawn.tolist() == [ICLEVR.multi_hot(labels) for labels in (["blue cube"], ["red cube"])]
    (data / "train.json").write_text(json.dumps(dict.fromkeys(names, ("red cube",))))
    (tmp_path / "run/state.pt").unlink()  # as if it had been interrupted before its first step
    refused(command(*command_line), r"setup\.json has another data; choose another folder")
    (data / "train.json").write_text(json.dumps(dict.fromkeys(names, ())))
    refused(command(*command_line), "none of the pictures has labels")


def test_the_command_from_teacher_to_few_steps(command: Command, tmp_path: Path) -> None:
    data, storage = write_data_folder(tmp_path / "data", pictures=4), tmp_path / "models"
    publish_toys(storage)
    common = ["train", "distilled", "--data", data, "--storage", storage, "--rank", 2, "--steps", 2, "--set", "batch=4"]
    first = ["--run", tmp_path / "one", "--trajectories", 4]
    succeeded(command(*common, *first, "--name", "first"))
    assert read_info(storage / "first.safetensors").config["sampling"]["steps"] == 4
    other = command(*common, *first, "--name", "x", "--teacher", "first")
    refused(other, "one/setup.json has another teacher; choose another folder")
    code, _, err = command(
        *common, "--name", "few", "--teacher", "first", "--run", tmp_path / "two",
        "--trajectories", 4, "--teacher-steps", 4, "--sampling-steps", 2,
    )  # fmt: skip
    assert code == 0, err
    info = read_info(storage / "few.safetensors")
    assert info.config["base"] == {"name": "toy", "digest": read_info(storage / "toy.safetensors").digest}
    assert (info.training["method"], info.training["teacher"], info.training["steps"]) == ("trajectories", "first", 2)
    assert load_denoiser(storage / "few.safetensors").options == SamplingOptions(sampler="ddim", steps=2, guidance=1.0)


def test_targets_are_clamped_as_the_sampling_loop_clamps(tmp_path: Path) -> None:
    """An eps prediction at cosine's noisiest timestep, where x0_hat would be thousands."""
    publish_toy_denoiser(tmp_path, "eps", 0, prediction="eps")
    teacher, labels = load_denoiser(tmp_path / "eps.safetensors"), torch.eye(len(ICLEVR))[:3]
    for steps, options in ((1, PATH), (3, SamplingOptions(sampler="ddim", steps=3, guidance=1.0))):
        cut = trajectories(teacher, teacher.stepper(), labels, [7, 8, 9], steps, options)
        noisiest = cut["t"] == 999
        assert float(cut["x0"][noisiest].abs().max()) <= 1
    objective = Distilling(cut, teacher, teacher.info, options, CPU)
    drawn = objective.draw(torch.arange(9), slice(0, 9), torch.Generator())
    assert float(objective(teacher.network, *drawn).detach()) < 0.01  # they take the same steps


def test_a_run_starts_from_an_adapter(teacher: Denoiser, tmp_path: Path) -> None:
    path = publish_adapter(_changed(teacher), teacher.info, tmp_path, "first", PATH, {"rank": 2})
    network, base = make_student(teacher, tmp_path, 2, 0, start_from="first")
    with torch.no_grad():
        assert torch.equal(network(*_inputs(teacher)), load_denoiser(path).network(*_inputs(teacher)))
    assert base.digest == teacher.info.digest
    other = teacher.info.model_copy(update={"name": "other"})
    publish_adapter(_changed(teacher), other, tmp_path, "of-other", PATH, {"rank": 2})
    with pytest.raises(TrainerError, match="of-other is not an adapter of toy"):
        make_student(teacher, tmp_path, 2, 0, start_from="of-other")
    with pytest.raises(TrainerError, match="first has changes of rank 2; use --rank 2"):
        make_student(teacher, tmp_path, 3, 0, start_from="first")


def test_a_run_starts_from_an_adapter_of_weights_that_have_learnt_on(teacher: Denoiser, tmp_path: Path) -> None:
    changed = _changed(teacher)
    former = teacher.info.model_copy(update={"digest": "0" * 64})
    publish_adapter(changed, former, tmp_path, "first", PATH, {"rank": 2})
    network, base = make_student(teacher, tmp_path, 2, 0, start_from="first")
    assert base.digest == teacher.info.digest
    for key, value in changed.tensors().items():
        assert torch.equal(network.tensors()[key], value.to(torch.bfloat16).float())
    vector = next(key for key, value in changed.changes.items() if value.ndim == 1)
    removed = changed.changes.pop(vector)  # as if the former network had had fewer blocks
    publish_adapter(changed, former, tmp_path, "smaller", PATH, {"rank": 2})
    network, _ = make_student(teacher, tmp_path, 2, 0, start_from="smaller")
    assert not network.changes[vector].any()
    changed.changes[f"{vector}/more"] = removed
    publish_adapter(changed, former, tmp_path, "larger", PATH, {"rank": 2})
    with pytest.raises(TrainerError, match="larger is an adapter of a former toy, which was another network"):
        make_student(teacher, tmp_path, 2, 0, start_from="larger")


def test_bad_arguments_of_distill_are_refused(command: Command, tmp_path: Path) -> None:
    data, storage = write_data_folder(tmp_path / "data", pictures=4), tmp_path / "models"
    publish_toys(storage)
    common = ["train", "distilled", "--data", data, "--storage", storage, "--name", "x"]
    refused(command(*common, "--steps", 1, "--set", "noise_levels=uniform"), "noise_levels: unknown; known are batch")
    refused(command(*common, "--steps", 1, "--patience", 1), "--patience needs --evaluator")
    refused(command(*common, "--steps", 1, "--teacher-steps", 7), "must be a multiple of --sampling-steps 4")
    refused(command(*common), "say how long")
    refused(command(*common, "--steps", 1, "--teacher", "nobody"), "nobody: no such denoiser")
    fewer = Evaluator(Vocabulary(ICLEVR.names[1:])).freeze()
    publish_evaluator(fewer, storage, "fewer", {})
    run = ("--steps", 1, "--run", tmp_path / "run")
    refused(command(*common, *run, "--evaluator", "fewer"), "fewer does not know the denoiser's labels gray cube;")
    base = load_denoiser(storage / "toy.safetensors")
    publish_adapter(AdaptedNetwork(base.network, 3), base.info, storage, "third", SamplingOptions(), {"rank": 3})
    refused(command(*common, *run, "--teacher", "third", "--rank", 2), "third has changes of rank 3")
    onto_its_base = command(*common, *run, "--teacher", "third", "--rank", 3, "--name", "toy")
    refused(onto_its_base, "toy: is the checkpoint that the new one changes, so it must stay")
    publish_toy_upsampler(storage, "large", base.info)
    refused(command(*common, *run, "--teacher", "large"), "large enlarges the pictures of toy; distil that one: --teac")
    assert not (tmp_path / "run").exists()


def test_a_refused_command_leaves_the_run_folder_as_it_was(command: Command, tmp_path: Path) -> None:
    data, storage, run = write_data_folder(tmp_path / "data", pictures=4), tmp_path / "models", tmp_path / "run"
    publish_toys(storage)
    publish_toy_denoiser(storage, "digits", 0, vocabulary=Vocabulary(("zero", "one")))
    common = ["train", "distilled", "--data", data, "--storage", storage, "--name", "x", "--steps", 1, "--run", run]
    refused(command(*common, "--teacher-steps", 4000), "steps: .*less than or equal to 1000, got 4000")
    refused(
        command(*common, "--teacher", "digits"),
        "digits does not know labels of the folder: gray cube, red cube, blue cube and 1 more",
    )
    assert not run.exists()
    run.mkdir()
    (run / "state.pt").write_bytes(b"of `trainer train`")
    refused(command(*common), "run holds the run of another command; choose another --run")
    assert [path.name for path in run.iterdir()] == ["state.pt"]
