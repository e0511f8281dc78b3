import copy
import errno
import io
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmdkit import (
    BackgroundCheckpoints,
    DamagedCheckpointError,
    ExponentialMovingAverage,
    FeatureStatistics,
    GeneratorState,
    Monitor,
    checkpoints,
    keep_checkpoint,
    linear_warmup,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from dmdkit.training import background, checkpoint_files
from dmdkit.training.checkpoint_state import require_states
from dmdkit.training.ranks import GlobalRandomState


class Run:
    """A run with everything that can be resumed, its randomness included."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.student, self.critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.of_student = torch.optim.AdamW(self.student.parameters(), lr=1e-2)
        self.of_critic = torch.optim.AdamW(self.critic.parameters(), lr=1e-2)
        self.schedule = linear_warmup(self.of_student, 8)
        self.ema = ExponentialMovingAverage(self.student, (0.5, 0.9))
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.monitor = Monitor(window=4, unstable_above=1e9)
        self.seen = FeatureStatistics(3)

    def train(self, first: int, last: int) -> "Run":
        for step in range(first, last):
            noise = torch.randn(4, 3, generator=self.generator)
            x = self.student(noise) + 0.1 * torch.randn(4, 3)  # the global generator
            if step % 2 == 0:
                self.critic(x).square().mean().backward()
                self.of_student.step()
                self.of_student.zero_grad()
                self.of_critic.zero_grad()
                self.schedule.step()
                self.ema.update(self.student)
            self.critic(x.detach()).cos().mean().backward()
            self.of_critic.step()
            self.of_critic.zero_grad()
            self.monitor.observe(step, x, {"gap": x.abs().mean()})
            self.seen.update(x)
        return self

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "modules": {"student": self.student, "critic": self.critic},
            "optimizers": {"student": self.of_student, "critic": self.of_critic},
            "states": {
                "schedule": self.schedule,
                "ema": self.ema,
                "noise": GeneratorState(self.generator),
                "monitor": self.monitor,
                "seen": self.seen,
            },
        }

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                **{k: m.state_dict() for k, m in self.parts["modules"].items()},
                **{
                    f"of_{k}": o.state_dict()
                    for k, o in self.parts["optimizers"].items()
                },
                **{k: s.state_dict() for k, s in self.parts["states"].items()},
                "global": torch.get_rng_state(),
            }
        )


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole = Run().train(0, 10).everything()
    path = save_checkpoint(tmp_path, step=stop, **Run().train(0, stop).parts)
    resumed = Run(seed=99)
    torch.manual_seed(1234)
    step = load_checkpoint(path, **resumed.parts)
    assert step == stop
    assert_equal(resumed.train(step, 10).everything(), whole)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    whole = Run().train(0, 10).everything()
    run = Run()
    for step in range(10):
        save_checkpoint(tmp_path, step=step, **run.parts, keep=2)
        run.train(step, step + 1)
    assert_equal(run.everything(), whole)


def test_the_generators_of_all_gpus_are_restored(monkeypatch) -> None:
    gpus = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: list(gpus))
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda v, i: gpus.__setitem__(i, v))
    state = GlobalRandomState().state_dict()
    gpus.append(gpus.pop(0))
    # One device more than when it was saved keeps what it has.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    GlobalRandomState().load_state_dict(state)
    assert [int(gpu) for gpu in gpus] == [1, 2]


def test_a_live_run_can_go_back(tmp_path: Path) -> None:
    run = Run().train(0, 3)
    path = save_checkpoint(tmp_path, step=3, **run.parts)
    there = run.everything()
    run.train(3, 6)
    run.critic(torch.ones(1, 3)).sum().backward()
    load_checkpoint(path, **run.parts)
    assert_equal(run.everything(), there)


def test_weights_that_never_got_a_gradient_are_no_obstacle(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        return module, torch.optim.AdamW(module.parameters())

    module, optimizer = build()
    module.get_submodule("used")(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parts = {"modules": {"critic": module}, "optimizers": {"critic": optimizer}}
    path = save_checkpoint(tmp_path, step=1, **parts)
    other, other_optimizer = build()
    parts = {"modules": {"critic": other}, "optimizers": {"critic": other_optimizer}}
    load_checkpoint(path, **parts)
    assert_equal(other.state_dict(), module.state_dict())
    assert_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_gradients_from_before_loading_do_not_keep_moments_out(tmp_path) -> None:
    run, other = Run().train(0, 3), Run(seed=2)
    path = save_checkpoint(tmp_path, step=3, **run.parts)
    other.critic(torch.ones(1, 3)).sum().backward()
    load_checkpoint(path, **other.parts)
    assert_equal(other.everything(), run.everything())
    assert all(p.grad is None for p in other.critic.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_other_optimizers_are_saved_too(tmp_path: Path, momentum: float) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(2, 2)
        return module, torch.optim.SGD(module.parameters(), 0.1, momentum=momentum)

    (module, optimizer), (other, other_optimizer) = build(), build()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    path = save_checkpoint(
        tmp_path, step=1, modules={"m": module}, optimizers={"m": optimizer}
    )
    load_checkpoint(path, modules={"m": other}, optimizers={"m": other_optimizer})
    for one, of in ((module, optimizer), (other, other_optimizer)):
        one(torch.ones(1, 2)).sum().backward()
        of.step()
    assert_equal(other.state_dict(), module.state_dict())


class CrashError(Exception):
    pass


@pytest.mark.parametrize(
    "where",
    [
        "torch.distributed.checkpoint.state_dict_saver.save",  # before anything
        "os.fsync",  # amid the tensors
        "json.dumps",  # before the file that says that all is there
        "pathlib.Path.rename",  # before the new name
    ],
)
def test_a_crash_while_writing_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = Run().train(0, 2)
    older = save_checkpoint(tmp_path, step=2, **run.parts)
    there = run.everything()
    run.train(2, 4)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises((CrashError, OSError)):
            save_checkpoint(tmp_path, step=4, **run.parts)
    assert checkpoints(tmp_path) == [older]
    fresh = Run(seed=5)
    assert load_checkpoint(checkpoints(tmp_path)[-1], **fresh.parts) == 2
    assert_equal(fresh.everything(), there)
    # What could not be finished takes no room.
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    newer = save_checkpoint(tmp_path, step=4, **run.parts)
    assert checkpoints(tmp_path) == [older, newer]
    assert load_checkpoint(newer, **fresh.parts) == 4


def test_half_a_checkpoint_is_not_listed_and_is_replaced(tmp_path: Path) -> None:
    run = Run()
    half = tmp_path / "step-00000003"
    left_over = tmp_path / ".step-00000003.partial"
    for folder in (half, left_over):
        folder.mkdir()
        (folder / "junk").write_text("half")
    assert checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="path: there is no complete checkpoint"):
        load_checkpoint(half, **run.parts)
    path = save_checkpoint(tmp_path, step=3, **run.parts)
    assert path == half
    assert checkpoints(tmp_path) == [path]
    assert not (path / "junk").exists()
    assert not left_over.exists()


def test_the_newest_are_kept_and_the_oldest_go_first(tmp_path: Path) -> None:
    run, saved = Run(), []
    for step in (5, 90, 1000, 20_000):
        saved.append(save_checkpoint(tmp_path, step=step, **run.parts, keep=2))
    assert checkpoints(tmp_path) == saved[2:]
    # A run that went back never deletes what it has just written.
    again = save_checkpoint(tmp_path, step=7, **run.parts, keep=1)
    assert again.is_dir()
    assert load_checkpoint(again, **run.parts) == 7
    assert checkpoints(tmp_path / "nowhere") == []


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = Run()
    save_checkpoint(tmp_path, step=1, **run.parts)
    with torch.no_grad():
        run.student.weight.fill_(3.0)
    path = save_checkpoint(tmp_path, step=1, **run.parts)
    fresh = Run(seed=4)
    load_checkpoint(path, **fresh.parts)
    assert fresh.student.weight.eq(3).all()


def test_other_parts_than_saved_are_named_and_nothing_is_touched(
    tmp_path: Path,
) -> None:
    path = save_checkpoint(tmp_path, step=1, **Run().parts)
    fresh = Run(seed=3)
    before = fresh.everything()
    parts = fresh.parts
    with pytest.raises(ValueError, match=r"holds .*state\.ema.*; asked for"):
        load_checkpoint(path, modules=parts["modules"], optimizers=parts["optimizers"])
    with pytest.raises(ValueError, match=r"asked for .*state\.loader"):
        load_checkpoint(
            path,
            modules=parts["modules"],
            optimizers=parts["optimizers"],
            states={**parts["states"], "loader": fresh.ema},
        )
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_checkpoint(tmp_path / "step-00000009", **parts)
    assert_equal(fresh.everything(), before)


def test_another_shape_than_saved_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, modules={"student": nn.Linear(2, 3)})
    with pytest.raises(ValueError, match=r"does not fit what was built: .*student"):
        load_checkpoint(path, modules={"student": nn.Linear(2, 4)})
    with pytest.raises(ValueError, match=r"does not fit what was built: .*0\.weight"):
        load_checkpoint(path, modules={"student": nn.Sequential(nn.Linear(2, 3))})


def test_a_state_may_change_its_shape_from_step_to_step(tmp_path: Path) -> None:
    class Loader:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    saved, fresh = Loader(), Loader()
    saved.state = {"order": [3, 1], "shards": [{"at": 5}, {"at": None}], "epoch": 2}
    modules = {"m": nn.Linear(1, 1)}
    path = save_checkpoint(tmp_path, step=1, modules=modules, states={"loader": saved})
    load_checkpoint(path, modules=modules, states={"loader": fresh})
    assert fresh.state == saved.state


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    parts = Run().parts
    with pytest.raises(ValueError, match="got -1, None, expected step >= 0"):
        save_checkpoint(tmp_path, step=-1, **parts)
    with pytest.raises(ValueError, match="got 1, 0, expected"):
        save_checkpoint(tmp_path, step=1, **parts, keep=0)
    with pytest.raises(ValueError, match="optimizers: student is no module"):
        save_checkpoint(
            tmp_path,
            step=1,
            modules={"critic": parts["modules"]["critic"]},
            optimizers={"student": parts["optimizers"]["student"]},
        )
    with pytest.raises(TypeError, match=r"noise is a torch.Generator; wrap it, dmdkit"):
        require_states({"noise": torch.Generator()})
    with pytest.raises(TypeError, match="states: step is a int, expected something"):
        require_states({"step": 3})
    assert checkpoints(tmp_path) == []


def damage(path: Path, how: str) -> Path:
    """Does to a checkpoint what disks and people do."""
    file = next(path.glob("*.distcp"))
    if how == "bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "gone":
        file.unlink()
    else:
        file = path / "manifest.json"
        file.write_text(file.read_text()[: {"half": 40, "empty": 0}[how]])
    return file


@pytest.mark.parametrize("how", ["bit", "short", "gone", "half", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, how: str
) -> None:
    run = Run().train(0, 2)
    older = save_checkpoint(tmp_path, step=2, **run.parts)
    there = run.everything()
    newer = save_checkpoint(tmp_path, step=4, **run.train(2, 4).parts)
    file = damage(newer, how)
    fresh = Run(seed=5)
    before = fresh.everything()
    with pytest.raises(DamagedCheckpointError) as error:
        load_checkpoint(newer, **fresh.parts)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert_equal(fresh.everything(), before)
    with pytest.warns(UserWarning, match=file.name):
        resumed = load_newest_checkpoint(tmp_path, **fresh.parts)
    assert resumed == (older, 2)
    assert_equal(fresh.everything(), there)
    damage(older, how)
    with (
        pytest.warns(UserWarning, match=file.name),
        pytest.raises(DamagedCheckpointError, match="all 2 checkpoints"),
    ):
        load_newest_checkpoint(tmp_path, **fresh.parts)


def test_there_may_be_no_checkpoint_yet(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path, **Run().parts) is None


def test_a_half_removed_checkpoint_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill amid the removal of the oldest leaves no folder that looks complete."""
    run = Run()
    for step in (1, 2):
        save_checkpoint(tmp_path, step=step, **run.parts)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real, calls = shutil.rmtree, []

        def rmtree(path: Any, **options: Any) -> None:
            calls.append(path)
            if str(path).endswith(".removed") and path.exists():
                killed()
            real(path, **options)

        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, step=3, **run.parts, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000003",
    ]
    save_checkpoint(tmp_path, step=4, **run.parts, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


class Faults:
    """Makes the n-th file operation fail as a full or broken disk does."""

    def __init__(self, fail_at: int | None, code: int) -> None:
        self.fail_at, self.code, self.count = fail_at, code, 0

    def tick(self, path: Any) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for where, name in (
            *((os, n) for n in ("fsync", "mkdir", "rename")),
            *((Path, n) for n in ("mkdir", "rename", "write_text")),
        ):
            patch.setattr(where, name, self.wrapped(getattr(where, name)))
        real = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = real(file, mode, *args, **kwargs)
            if any(letter in mode for letter in "wax+"):
                try:
                    self.tick(file)
                except OSError:
                    handle.close()
                    raise
                handle = Writing(handle, lambda: self.tick(file))
            return handle

        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)

    def wrapped(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick(args[0] if args else "")
            return real(*args, **kwargs)

        return call


class Writing:
    """A file whose every write may fail."""

    def __init__(self, file: Any, tick: Any) -> None:
        self._file, self._tick = file, tick

    def write(self, data: Any) -> int:
        self._tick()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_no_write_error_costs_more_than_the_checkpoint_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A fault at each file operation of a save in turn."""
    run = Run().train(0, 2)
    older = save_checkpoint(tmp_path, step=2, **run.parts)
    there = run.train(2, 4).everything()

    def save(fail_at: int | None) -> tuple[int, Exception | None]:
        faults = Faults(fail_at, code)
        with monkeypatch.context() as patch:
            faults.install(patch)
            try:
                save_checkpoint(tmp_path, step=4, **run.parts)
            except OSError as error:
                return faults.count, error
        return faults.count, None

    operations, error = save(None)
    assert error is None
    assert operations > 20
    shutil.rmtree(checkpoints(tmp_path)[-1])
    for n in range(1, operations + 1):
        _, error = save(n)
        assert_equal(run.everything(), there)
        complete = checkpoints(tmp_path)
        if error is None or len(complete) == 2:
            # The last flush came after the name: the checkpoint is there, and whole.
            assert n == operations or error is None
            load_checkpoint(complete[-1], **Run(seed=7).parts)
            shutil.rmtree(complete[-1])
            continue
        # PyTorch's archive writer says "unexpected pos" for a full disk.
        assert os.strerror(code) in str(error) or "GiB free" in str(error), n
        assert "\n" not in str(error)
        assert complete == [older]
    fresh = Run(seed=5)
    assert load_checkpoint(older, **fresh.parts) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    run = Run().train(0, 2)
    there = run.everything()
    with pytest.raises(OSError, match="file"):
        save_checkpoint(file, step=2, **run.parts)
    assert_equal(run.everything(), there)
    assert file.read_text() == "in the way"


def test_a_disk_that_is_not_shared_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's file is on another machine: no checkpoint, and the run knows."""
    run, elsewhere = Run().train(0, 2), {"__1_0.distcp": {"bytes": 1, "sha256": "0"}}
    own = checkpoint_files.everywhere
    monkeypatch.setattr(checkpoint_files, "PATIENCE", 0)
    monkeypatch.setattr(
        checkpoint_files,
        "everywhere",
        lambda action, group=None: [*own(action, group), elsewhere],
    )
    with pytest.raises(OSError, match=r"__1_0\.distcp.*on a disk they share"):
        save_checkpoint(tmp_path, step=2, **run.parts)
    assert checkpoints(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_what_another_rank_wrote_may_be_seen_late(tmp_path: Path) -> None:
    file = tmp_path / "late"
    timer = threading.Timer(0.2, file.touch)
    timer.start()
    checkpoint_files.require_visible([file])
    timer.join()


def test_what_is_written_in_the_background_is_the_state_when_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), background.write_state

    def slow(*given: Any) -> Path:
        assert gate.wait(30)
        return write(*given)

    monkeypatch.setattr(background, "write_state", slow)
    run = Run().train(0, 4)
    expected = run.everything()
    with BackgroundCheckpoints() as writer:
        assert writer.wait() is None
        writer.save(tmp_path, step=4, **run.parts)
        run.train(4, 6)
        assert checkpoints(tmp_path) == []
        gate.set()
        assert writer.wait() == tmp_path / "step-00000004"
        writer.save(tmp_path, step=6, keep=2, **run.parts)
    first, second = checkpoints(tmp_path)
    other = Run(seed=5)
    assert load_checkpoint(first, **other.parts) == 4
    assert_equal(other.everything(), expected)
    assert load_checkpoint(second, **other.parts) == 6
    assert_equal(other.everything(), run.everything())


def test_an_error_of_writing_in_the_background_is_raised_by_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run().train(0, 4)
    save_checkpoint(tmp_path, step=2, **run.parts)

    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = BackgroundCheckpoints()
    with monkeypatch.context() as patched:
        patched.setattr(background, "write_state", full)
        writer.save(tmp_path, step=4, **run.parts)
        with pytest.raises(OSError, match="No space"):
            writer.save(tmp_path, step=5, **run.parts)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    writer.save(tmp_path, step=6, **run.parts)  # and it can go on
    assert writer.wait() == tmp_path / "step-00000006"
    with pytest.raises(ValueError, match="keep >= 1"):
        writer.save(tmp_path, step=6, keep=0, **run.parts)


def test_a_checkpoint_is_kept_when_it_is_no_longer_among_the_newest(
    tmp_path: Path,
) -> None:
    run = Run().train(0, 4)
    expected = run.everything()
    first = save_checkpoint(tmp_path, step=4, **run.parts)
    (tmp_path / "kept").mkdir()
    best = keep_checkpoint(first, tmp_path / "best", {"fid": 2.0})
    save_checkpoint(tmp_path, step=6, keep=1, **run.train(4, 6).parts)
    assert not first.exists()
    assert (best / "best.json").read_text() == '{\n  "fid": 2.0\n}\n'
    other = Run(seed=5)
    assert load_checkpoint(best, **other.parts) == 4
    assert_equal(other.everything(), expected)
    twice = keep_checkpoint(best, tmp_path / "kept" / "best")
    assert (best / "best.json").read_text() == '{\n  "fid": 2.0\n}\n'
    assert (twice / "best.json").read_text() == "{}\n"
    keep_checkpoint(checkpoints(tmp_path)[-1], best)
    assert load_checkpoint(best, **other.parts) == 6
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000006"]
    with pytest.raises(ValueError, match="no complete checkpoint"):
        keep_checkpoint(tmp_path / "none", best)
    assert load_checkpoint(best, **other.parts) == 6


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch wraps it in an error of its own, which would look like a full disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    run = Run().train(0, 4)
    save_checkpoint(tmp_path, step=2, **run.parts)
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, step=4, **run.parts)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
