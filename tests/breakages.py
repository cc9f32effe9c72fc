"""`python -m tests.breakages [NUMBER ...]`: break one promise after another, and see that its tests notice.

Works in a copy of this checkout. Prints a row for each, and ends with 1 if one survives or no longer applies, or if the
tests fail without it. `--list` prints the numbers.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.paths import ROOT, TASK_FILES


class Breakage(NamedTuple):
    """`old` stands in `file` once and becomes `new`; `tests` is one file or folder."""

    promise: str
    file: str
    old: str
    new: str
    tests: str


LUA, STORE, WORKER = "service/store/jobs.lua", "tests/service/store", "tests/service/worker"

BREAKAGES = [
    Breakage(
        "of a picture's verdicts the first counts",
        LUA, "redis.call('HSETNX', keys.verdicts, picture.index, picture.verdict) == 0",
        "redis.call('HSET', keys.verdicts, picture.index, picture.verdict) == 0", f"{STORE}/test_jobs_lua.py",
    ),
    Breakage(
        "a job finishes when it has all verdicts",
        LUA, "elseif grid.fields and redis.call('HLEN', keys.verdicts) >= tonumber(state.total) then",
        "elseif grid.fields then",
        f"{STORE}/test_job_model.py",
    ),
    Breakage(
        "a terminal status is final",
        LUA, "return is_open(state.status) and state or nil, state.status ~= false",
        "return state.status and state or nil, state.status ~= false", f"{STORE}/test_job_model.py",
    ),
    Breakage(
        "a deleted job's pictures no longer count for its owner",
        LUA, "redis.call('HINCRBY', key_of_stored(owner), hour_of(id), -total)",
        "redis.call('HINCRBY', key_of_stored(owner), hour_of(id), 0)", f"{STORE}/test_job_model.py",
    ),
    Breakage(
        "one time-out replaces all idle connections to Redis",
        "service/store/connection.py", "        except TimeoutError:\n            self.drop_idle()\n",
        "        except TimeoutError:\n            pass\n",
        f"{STORE}/test_connection.py",
    ),
    Breakage(
        "the queue has a limit",
        LUA, "if queued > 0 and queued + new.draws > new.most_queued then",
        "if queued > 0 and queued > new.most_queued then", f"{STORE}/test_async_jobs.py",
    ),
    Breakage(
        "owners take turns",
        LUA, "redis.call('ZADD', model.turns, owner.turn, owner.name)",
        "redis.call('ZADD', model.turns, 0, owner.name)", f"{STORE}/test_claims.py",
    ),
    Breakage(
        "a full Redis still takes results",
        LUA, "register('commit', commit, {'allow-oom'})", "register('commit', commit, {})",
        f"{STORE}/test_jobs_lua.py",
    ),
    Breakage(
        "a released picture has not killed a worker",
        "service/store/claims.py", ", retrycount=0)", ", retrycount=1)", f"{STORE}/test_claims.py",
    ),
    Breakage(
        "a stopping worker gives back what it cannot finish",
        "service/worker/runner.py", "stream.release(list(stream.leased))", "pass",
        f"{WORKER}/test_runner.py",
    ),
    Breakage(
        "a picture's file is there before its verdict",
        "service/worker/storer.py",
        "        await self._all(work, writes, largest)\n", "        self._all(work, writes, largest).close()\n",
        f"{WORKER}/test_storer.py",
    ),
    Breakage(
        "files of deleted jobs go",
        "service/worker/storer.py",
        "complete += complete\n        await self._remove(gone, work)\n", "complete += complete\n",
        f"{WORKER}/test_storer.py",
    ),
    Breakage(
        "a death counts", "service/worker/runner.py",
        "        except RedisError:\n            if not self.stopping:\n                raise\n",
        "        finally:\n            self.release_claims()\n", f"{WORKER}/test_runner.py",
    ),
    Breakage(
        "a worker whose storage fails claims nothing", "service/worker/runner.py",
        "in self.models.claiming() if not self.storage.problem else ():", "in self.models.claiming():",
        f"{WORKER}/test_runner.py",
    ),
    Breakage(
        "few models stay loaded",
        "service/worker/models.py",
        "too_many = isinstance(loaded.engine, Engine) and len(self.denoisers()) > self.settings.loaded_models",
        "too_many = False", f"{WORKER}/test_models.py",
    ),
    Breakage(
        "nothing is answered without a known key",
        "service/api/access/guard.py", "        if owner is None:\n", "        if False:\n",
        "tests/service/api/access/test_guard.py",
    ),
    Breakage(
        "pages of other sites change nothing",
        "service/api/access/guard.py", 'if is_from_page and scope["method"] not in SAFE_METHODS:', "if False:",
        "tests/service/api/access/test_guard.py",
    ),
    Breakage(
        "large bodies are refused",
        "service/api/access/guard.py", "if max(self.received, self._announced) > self._most:", "if False:",
        "tests/service/api/uploads/test_body.py",
    ),
    Breakage(
        "an adapter without its base is no model",
        "shared/registry.py", "if name := base_of(info):", "if name := None:",
        "tests/service/api/test_catalog.py",
    ),
    Breakage(
        "no webhook reaches a private network by another spelling",
        "service/webhooks/addresses.py", "return is_public(inner)", "return True",
        "tests/service/webhooks/test_addresses.py",
    ),
    Breakage(
        "classifier-free guidance weighs both predictions",
        "shared/diffusion/denoise.py", "((True, scale), (False, 1 - scale))", "((True, scale), (False, -scale))",
        "tests/shared/diffusion/test_denoise.py",
    ),
    Breakage(
        "a step that fails changes no row",
        "shared/diffusion/denoise.py", "row.generator.clone_state() if add else None", "row.generator if add else None",
        "tests/shared/diffusion/test_denoise.py",
    ),
    Breakage(
        "DPM-Solver++ 2M is of second order",
        "shared/diffusion/samplers.py", "half[1:-1] = h[1:-1] / h[:-2] / 2", "half[1:-1] = 0",
        "tests/shared/diffusion/test_samplers.py",
    ),
    Breakage(
        "cosine keeps a signal at its last timestep",
        "shared/diffusion/schedules.py", "BETA_CLIP = 0.999 ", "BETA_CLIP = 0.9999 ",
        "tests/shared/diffusion/test_schedules.py",
    ),
    Breakage(
        "given positions change nothing but the positions",
        "shared/diffusion/denoise.py", "            drawn = self.layouts.draw(torch.stack(hot), generators)\n",
        "            drawn = places if None not in places else self.layouts.draw(torch.stack(hot), generators)\n",
        "tests/shared/diffusion/test_positions.py",
    ),
    Breakage(
        "a row has the same bits in every batch of OpenVINO",
        "shared/openvino.py", "if is_new and not self._has_bits(compiled, size):", "if False:",
        "tests/shared/test_openvino.py",
    ),
    Breakage(
        "a damaged checkpoint is refused",
        "shared/checkpoint.py", "if digest_of(digest.hexdigest(), info.config) != info.digest:", "if False:",
        "tests/shared/test_checkpoint.py",
    ),
    Breakage(
        "a checkpoint is replaced as a whole, also through a power cut",
        "shared/storage.py", "            os.fsync(file.fileno())\n", "", "tests/shared/test_checkpoint.py",
    ),
    Breakage(
        "a denoiser is judged by an evaluator that knows its labels",
        "shared/registry.py", "[one for one in evaluators if labels.issubset(one.vocabulary)]", "evaluators",
        "tests/shared/test_registry.py",
    ),
    Breakage(
        "the course's accuracy counts the k most probable labels",
        "shared/evaluator.py", "return rank < targets.sum(1, keepdim=True)", "return probabilities > 0.5",
        "tests/shared/test_evaluator.py",
    ),
    Breakage(
        "a model refuses places that it has not learnt",
        "shared/support.py", "TOLERANCE: Final = 0.02 ", "TOLERANCE: Final = 0.2 ", "tests/shared/test_support.py",
    ),
    Breakage(
        "the long average is EDM2's",
        "trainer/averages.py", "beta = (1 - 1 / n) ** (self.power + 1)", "beta = (1 - 1 / n) ** self.power",
        "tests/trainer/test_averages.py",
    ),
    Breakage(
        "min-SNR weighs the error of x_0",
        "trainer/loss.py", "return snr.clamp(max=config.min_snr_gamma) * amplified.square()",
        "return snr.clamp(max=config.min_snr_gamma)", "tests/trainer/test_loss.py",
    ),
    Breakage(
        "a resumed run ends as one that was not interrupted",
        "trainer/train.py", '        self.averages.load_state_dict(state["averages"])\n', "",
        "tests/trainer/test_train.py",
    ),
    Breakage(
        "parts of a batch add up to its gradient",
        "trainer/train.py", "own = self.objective(wrapper or training.network, *inputs) / len(self.parts)",
        "own = self.objective(wrapper or training.network, *inputs)", "tests/trainer/test_train.py",
    ),
    Breakage(
        "patience ends a run",
        "trainer/train.py", "if self.patience and best and best.worse_since >= self.patience:", "if False:",
        "tests/trainer/test_train.py",
    ),
    Breakage(
        "a run is not resumed with another recipe",
        "trainer/runs.py", "[key for key in recipe if recipe[key] not in", "[key for key in recipe if None in",
        "tests/trainer/test_train.py",
    ),
    Breakage(
        "work that cannot begin to be stored is not held",
        "service/worker/storer.py", "            self._end(work)\n            raise", "            raise",
        f"{WORKER}/test_storer.py",
    ),
    Breakage(
        "layouts are those that knew held-out ones best",
        "trainer/objectives/layouts.py", "if best := training.best:", "if best := None:",
        "tests/trainer/objectives/test_layouts.py",
    ),
    Breakage(
        "distillation clamps as the sampling loop does",
        "trainer/objectives/distilled.py", "float(b)).clamp(-float(limits[t]), float(limits[t]))", "float(b))",
        "tests/trainer/objectives/test_distilled.py",
    ),
    Breakage(
        "pictures are held out by whole groups",
        "trainer/importer/folders.py", "groups.setdefault(item.group, [])", "groups.setdefault(item.file, [])",
        "tests/trainer/importer/test_folders.py",
    ),
    Breakage(
        "a changed picture is decoded again",
        "trainer/data.py", "{status.st_mtime_ns} {status.st_size}", "", "tests/trainer/test_data.py",
    ),
    Breakage(
        "scores of more runs stay in a card",
        "trainer/studies/card.py", "return scores if one.runs > new.runs else", "return",
        "tests/trainer/studies/test_card.py",
    ),
    Breakage(
        "a denoiser is scored by an evaluator that knows its labels",
        "trainer/score.py", "if unknown := [label for label in vocabulary.names if label not in judge.vocabulary]:",
        "if unknown := []:", "tests/trainer/objectives/test_distilled.py",
    ),
]  # fmt: skip


def copy_checkout(folder: Path) -> Path:
    """Copy what git knows, or would add, of this checkout, beside the task's own files."""
    line = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed, copy = subprocess.run(line, cwd=ROOT, capture_output=True, check=True), folder / "checkout"
    for name in sorted(set(filter(None, listed.stdout.decode().split("\0")))):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    if TASK_FILES.exists():
        (folder / TASK_FILES.name).symlink_to(TASK_FILES.resolve())
    return copy


def run_tests(copy: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest, which ends with 1 if a test fails."""
    # No byte code, which Python would take for that of a file with as many bytes, changed in the same second.
    variables = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(line, cwd=copy, env=variables, capture_output=True, text=True, check=False)


def outcome(copy: Path, one: Breakage) -> str:
    file = copy / one.file
    text = file.read_text()
    if text.count(one.old) != 1:
        return "no longer applies"
    file.write_text(text.replace(one.old, one.new))
    code = run_tests(copy, [one.tests]).returncode
    file.write_text(text)
    return {0: "survived", 1: "caught"}.get(code, f"pytest ended with {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Break promises on purpose, and see which tests notice.")
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="only these; all by default")
    parser.add_argument("--list", action="store_true", help="print the promises, and run nothing")
    arguments = parser.parse_args()
    chosen = {number: one for number, one in enumerate(BREAKAGES, 1) if number in (arguments.numbers or [number])}
    if arguments.list:
        print("\n".join(f"{number:2} {one.promise} ({one.file})" for number, one in chosen.items()))
        return 0
    with tempfile.TemporaryDirectory(prefix="breakages-") as folder:
        copy = copy_checkout(Path(folder))
        unbroken = run_tests(copy, sorted({one.tests for one in chosen.values()}))
        if unbroken.returncode:
            print(f"{unbroken.stdout}\nsome of the tests fail without any breakage")
            return 1
        found = []
        for number, one in chosen.items():
            found.append(outcome(copy, one))
            print(f"{number:2} {found[-1]:9} {one.promise} ({one.tests})", flush=True)
    caught = found.count("caught")
    print(f"{caught} of {len(found)} caught")
    return int(caught < len(found))


if __name__ == "__main__":
    sys.exit(main())
