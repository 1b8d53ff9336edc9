"""What `RuntimeBenchmark` measures: pieces of work whose cost is known, by a clock that only they move."""

import copy
import csv
import json
import sys
from collections import Counter
from types import SimpleNamespace

import lightning as L
import pytest
import references
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from tiny import QUIET, make_rows, tiny_model
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from transformers import ByT5Tokenizer

from srd_lightning import (
    Decoding,
    HyperparameterScheduler,
    KDLightningModule,
    ResumeCheckpoint,
    RuntimeBenchmark,
    SRDDataModule,
)
from srd_lightning.errors import StorageError
from srd_lightning.metering import energy, operations
from srd_lightning.metering.clock import PartClock
from srd_lightning.metering.energy import EnergyMeter
from srd_lightning.metering.memory import peak_memory, reset_peaks
from srd_lightning.metering.operations import Parameters, measured_peak
from srd_lightning.metering.table import table_of
from srd_lightning.metering.work import PARTS, Work
from srd_lightning.preflight import run_preflight
from srd_lightning.protocols import unwatched

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still but for the work that moves it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine that makes a million operations per second; what is measured of a real one is tested by itself."""
    monkeypatch.setattr("srd_lightning.callbacks.runtime.measured_peak", lambda device, dtype: 1e6)


def fit(module, data, folder, callbacks=(), ckpt_path=None, **settings):
    """Train, and return what was reported."""
    benchmark = RuntimeBenchmark()
    settings = {**QUIET, "num_sanity_val_steps": 0, "default_root_dir": folder, **settings}
    trainer = L.Trainer(callbacks=[benchmark, *callbacks], **settings)
    loaders = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(module, ckpt_path=ckpt_path, **loaders)
    return benchmark.report


def lines_of(folder):
    """Return what was written of each epoch."""
    return [json.loads(line) for line in (folder / "runtime.jsonl").read_text().splitlines()]


def two_splits(number):
    rows = make_rows(number)
    return {"train": rows, "validation": rows[:2]}


class Costly(BoringModel):
    """A stranger's module, each of whose pieces takes a time of its own."""

    def __init__(self, now):
        super().__init__()
        self.now = now

    def spend(self, seconds):
        self.now.seconds += seconds

    def training_step(self, batch, batch_idx):
        self.spend(3)
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        self.spend(5)
        super().backward(loss)

    def configure_optimizers(self):
        now = self.now

        class Costly(SGD):
            def step(self, closure=None):
                closure()
                now.seconds += 7

        return Costly(self.parameters(), lr=0.1)

    def optimizer_zero_grad(self, *given):
        self.spend(1)
        super().optimizer_zero_grad(*given)

    def configure_gradient_clipping(self, *given, **settings):
        self.spend(2)

    def on_validation_epoch_start(self):
        self.spend(11)

    def on_train_epoch_end(self):
        self.spend(17)

    def val_dataloader(self):
        return DataLoader(RandomDataset(32, 2))


class Slow(Dataset):
    def __init__(self, now, rows):
        self.now, self.rows = now, rows

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        self.now.seconds += 0.5
        return torch.ones(32)


class Writes(TorchCheckpointIO):
    def __init__(self, now):
        self.now = now

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.now.seconds += 13
        super().save_checkpoint(checkpoint, path, storage_options)


class TestParts:
    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_of_a_foreign_module(self, now, tmp_path, accumulated):
        loader = DataLoader(Slow(now, 8), batch_size=2)
        report = fit(
            *(Costly(now), loader, tmp_path),
            [ModelCheckpoint(tmp_path / "saved", every_n_epochs=1)],
            max_epochs=2,
            accumulate_grad_batches=accumulated,
            enable_checkpointing=True,
            plugins=[Writes(now)],
        )
        steps = 8 / accumulated
        expected = {
            "data": 8 * 2 * 0.5,
            "forward": 8 * 3,
            "backward": 8 * 5,
            "optimizer": steps * (1 + 2 + 7),
            "validation": 2 * 11,
            "checkpoints": 2 * 13,
            "rest": 2 * 17,
        }
        assert {name: seconds for name, seconds in report["parts"].items() if seconds} == expected
        assert report["seconds"] == now.seconds - 100 == sum(expected.values())
        (stage,) = report["stages"]
        seconds = sum(expected.values()) - expected["validation"] - expected["checkpoints"]
        assert (stage["seconds"], stage["waiting_seconds"], report["validation_seconds"]) == (seconds, 8.0, 22.0)
        assert (stage["steps"], stage["trained_rows"], stage["rows_per_second"]) == (steps, 16, 16 / seconds)
        unknown = {"response_tokens_per_second", "positions_per_second", "model_flops", "mfu"}
        assert not unknown & stage.keys()
        assert not {"device_peak_memory_bytes", "energy_joules"} & report.keys()

    def test_of_steps_by_hand_with_two_optimizers(self, now, tmp_path):
        class ByHand(Costly):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for number, optimizer in enumerate(self.optimizers()):
                    self.spend(10 + number)
                    optimizer.zero_grad()
                    self.manual_backward(BoringModel.training_step(self, batch, batch_idx)["loss"])
                    self.spend(100)
                    optimizer.step()
                self.spend(1000)

            def configure_optimizers(self):
                first, second = (Costly.configure_optimizers(self) for _ in range(2))
                return first, second

        report = fit(ByHand(now), DataLoader(Slow(now, 3)), tmp_path, max_epochs=1, limit_val_batches=0)
        expected = {
            "data": 3 * 0.5,
            "forward": 3 * (10 + 11 + 2 * 100 + 1000),
            "backward": 3 * 2 * 5,
            "optimizer": 3 * 2 * 7,
            "rest": 17,
        }
        assert {name: seconds for name, seconds in report["parts"].items() if seconds} == expected
        assert [stage["steps"] for stage in report["stages"]] == [6]

    def test_validation_within_an_epoch_is_no_waiting(self, now, tmp_path):
        report = fit(Costly(now), DataLoader(Slow(now, 4)), tmp_path, max_epochs=1, val_check_interval=1)
        assert (report["validation_seconds"], report["parts"]["data"]) == (4 * 11, 4 * 0.5)

    @pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 60}, {"chunk": None}], ids=str)
    def test_the_teacher_is_told_apart(self, now, tmp_path, options):
        asked = Counter()

        def slow(name, seconds):
            def spend(*_):
                now.seconds += seconds
                asked[name, module.trainer.current_epoch, not module.training] += 1

            model = tiny_model()
            model.model.register_forward_hook(spend)
            return model

        module = KDLightningModule(slow("student", 3), slow("teacher", 10), kd_weight=0.0, **options)
        module.on_train_start = asked.clear  # the models were looked at before rows were read
        data = SRDDataModule(two_splits(8), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
        schedule = HyperparameterScheduler({"kd_weight": {0: 0.0, 1: 0.5}})
        report = fit(module, data, tmp_path, [schedule], max_epochs=2)
        first, second = lines_of(tmp_path)
        spent = 3 * asked["student", 0, False] + 10 * asked["teacher", 0, False]  # to see whether they can be split
        assert (first["parts"]["forward"], "teacher" in first["parts"]) == (spent, False)
        assert second["parts"]["forward"] == 3 * asked["student", 1, False] >= 3 * 2
        assert second["parts"]["teacher"] == 10 * asked["teacher", 1, False] >= 10 * 2
        for line in (first, second):
            calls = (asked[name, line["epoch"], True] for name in ("student", "teacher"))
            assert line["parts"]["validation"] == 3 * next(calls) + 10 * next(calls)  # not told apart there
        size = Parameters.of(tiny_model()).trained
        assert report["parameters"] == {"trained": size, "frozen": 0, "teacher": size}
        assert [line["model_flops"] / line["tokens"] for line in (first, second)] == [6 * size, 8 * size]
        (stage,) = report["stages"]
        assert stage["mfu"] == pytest.approx(7 * size * stage["tokens"] / (1e6 * stage["seconds"]))

    def test_of_the_set_up(self, now, tmp_path, monkeypatch):
        def costs(place, seconds):
            owner, name = place.rsplit(".", 1)
            module, _, kind = owner.partition(":")
            holder = sys.modules[module] if not kind else getattr(sys.modules[module], kind)
            work = getattr(holder, name)

            def costly(*given, **settings):
                now.seconds += seconds
                return work(*given, **settings)

            monkeypatch.setattr(holder, name, costly)

        costs("srd_lightning.curation.curator:Curator.curate", 100)
        costs("srd_lightning.curation.curator:StagedRows.refresh", 20)
        costs("srd_lightning.teacher.handle.cache_teacher", 3000)
        costs("srd_lightning.data.row_reader:RowReader.read", 40000)
        costs("srd_lightning.checkpoints.files.write", 500000)
        module = KDLightningModule(tiny_model(0), tiny_model(1), teacher_cache="hidden")
        data = SRDDataModule(make_rows(8), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
        saves = {"enable_checkpointing": True, "max_epochs": 2}
        report = fit(module, data, tmp_path, [ResumeCheckpoint(tmp_path / "saved")], **saves)
        expected = {"curation": 100, "teacher_cache": 3000, "refresh": 40, "checkpoints": 1000000, "rest": 40000}
        assert {name: seconds for name, seconds in report["parts"].items() if seconds} == expected
        assert report["refresh_seconds"] == 40
        assert report["parameters"]["teacher"] == 0  # it is not run again
        assert data._around is module.step.around is unwatched

    def test_they_are_the_whole(self, tmp_path):
        """By a real clock, with everything on."""
        module = KDLightningModule(tiny_model(0), tiny_model(1), kd_weight=0.5)
        staged = {"schedule": {0: 0.5, 1: 1.0}, "decoding": Decoding(max_new_tokens=1)}
        data = SRDDataModule(two_splits(8), ByT5Tokenizer(), batch_size=2, **staged)
        logger = CSVLogger(tmp_path, name="", version="")
        report = fit(module, data, tmp_path, max_epochs=3, logger=logger, num_sanity_val_steps=1)
        assert json.loads((tmp_path / "runtime.json").read_text()) == report
        assert sum(report["parts"].values()) == pytest.approx(report["seconds"])
        assert list(report["parts"]) == [part for part in PARTS if part in report["parts"]]
        lines = lines_of(tmp_path)
        assert [(line["epoch"], line["stage"]) for line in lines] == [(0, 0), (1, 1), (2, 1)]
        for number, stage in enumerate(report["stages"]):
            own = [line for line in lines if line["stage"] == number]
            for name in ("steps", "tokens", "response_tokens", "positions", "trained_rows", "model_flops", "seconds"):
                assert stage[name] == pytest.approx(sum(line[name] for line in own))
            for part, seconds in stage["parts"].items():
                assert seconds == pytest.approx(sum(line["parts"].get(part, 0.0) for line in own))
            inside = sum(stage["parts"].get(part, 0.0) for part in ("validation", "refresh"))
            assert sum(stage["parts"].values()) == pytest.approx(stage["seconds"] + inside)
        with (tmp_path / "metrics.csv").open() as file:
            logged = [row for row in csv.DictReader(file) if row["runtime/padding"]]
        assert len(logged) == 3
        assert {name for name in logged[0] if name.startswith("runtime/")} == set(RuntimeBenchmark.logged)
        assert float(logged[-1]["runtime/forward_seconds"]) == pytest.approx(lines[-1]["parts"]["forward"], rel=1e-3)


class TestCounts:
    def test_rows_steps_tokens(self, tmp_path):
        batches = {}

        class Seen(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                lengths = batch["attention_mask"].sum(dim=1).tolist()
                batches.setdefault(trainer.current_epoch // 2, []).append(lengths)

        data = SRDDataModule(
            *(make_rows(16), ByT5Tokenizer()),
            schedule={0: 0.5, 2: 0.75},
            decoding=Decoding(max_new_tokens=1),
            batch_size=4,
        )
        report = fit(KDLightningModule(tiny_model(0), kd_weight=0.0), data, tmp_path, [Seen()], max_epochs=3)
        rows = data.rows["train"]
        order = data.curriculum.order
        for stage, size, epochs in zip(report["stages"], (8, 12), (2, 1), strict=True):
            pool = [rows[row] for row in order[:size].tolist()]
            tokens = epochs * sum(len(row["input_ids"]) for row in pool)
            own = batches[report["stages"].index(stage)]
            assert stage["rows"] == size
            assert stage["steps"] == epochs * size // 4
            assert stage["trained_rows"] == epochs * size
            assert stage["tokens"] == tokens
            assert stage["response_tokens"] == tokens - epochs * sum(row["prompt_length"] for row in pool)
            assert stage["positions"] == sum(len(batch) * max(batch) for batch in own)
            assert stage["padding"] == pytest.approx(references.share_of_padding(own))
            assert stage["response_tokens_per_second"] == stage["response_tokens"] / stage["seconds"]
        assert (report["curation"]["rows"], report["curation"]["kept"]) == (16, 12)

    def test_of_several_loaders_and_no_curriculum(self, tmp_path):
        class Two(BoringModel):
            def training_step(self, batch, batch_idx):
                return self.layer(batch["a"]).sum()

        loaders = {"a": DataLoader(torch.ones(8, 32)), "b": DataLoader(range(5))}
        report = fit(Two(), loaders, tmp_path, max_epochs=1)
        assert [(stage["rows"], stage["trained_rows"]) for stage in report["stages"]] == [(13, 8)]

    def test_no_gpu_is_asked_on_a_cpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("synchronize", "Event", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: pytest.fail("a context was made"))
        report = fit(BoringModel(), DataLoader(RandomDataset(32, 8)), tmp_path, max_epochs=1)
        assert report["peak_memory_bytes"] == report["host_peak_memory_bytes"] > 10 * 2**20


class TestResume:
    @pytest.fixture
    def train(self, now, tmp_path):
        def train(callbacks=(), ckpt_path=None, epochs=3):
            data = DataLoader(Slow(now, 8), batch_size=2)
            return fit(Costly(now), data, tmp_path, callbacks, ckpt_path, max_epochs=epochs)

        return train

    def check(self, found, whole, folder):
        parts = ("data", "forward", "backward", "optimizer", "validation")
        assert {part: found["parts"][part] for part in parts} == {part: whole["parts"][part] for part in parts}
        for name in ("steps", "trained_rows", "rows"):
            assert found["stages"][0][name] == whole["stages"][0][name]
        assert [line["epoch"] for line in lines_of(folder)] == [0, 1, 2]

    def test_it_adds_up(self, train, tmp_path):
        class Keeps(L.Callback):
            def on_fit_end(self, trainer, pl_module):
                trainer.save_checkpoint(tmp_path / "some.ckpt")

        whole = train()
        train([Keeps()], epochs=1)
        self.check(train(ckpt_path=tmp_path / "some.ckpt"), whole, tmp_path)

    def test_it_adds_up_within_an_epoch(self, train, tmp_path):
        class Stops(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.global_step == 6:
                    trainer.save_checkpoint(tmp_path / "some.ckpt")
                    raise KeyboardInterrupt

        whole = train()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train([Stops()])
        self.check(train(ckpt_path=tmp_path / "some.ckpt"), whole, tmp_path)

    def test_a_second_run_begins_anew(self, now, tmp_path):
        benchmark = RuntimeBenchmark()
        for _ in range(2):
            settings = {**QUIET, "default_root_dir": tmp_path, "max_epochs": 1, "callbacks": [benchmark]}
            L.Trainer(**settings).fit(Costly(now), DataLoader(Slow(now, 4)))
            assert benchmark.report["parts"]["forward"] == 4 * 3

    def test_a_trainer_that_goes_on_adds_up(self, now, tmp_path):
        benchmark = RuntimeBenchmark()
        trainer = L.Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1, callbacks=[benchmark])
        module = Costly(now)
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, DataLoader(Slow(now, 4)))
        assert benchmark.report["parts"]["forward"] == 2 * 4 * 3

    def test_a_run_that_fails_leaves_nothing_behind(self, now, tmp_path):
        class Fails(L.Callback):
            def on_train_batch_end(self, *_):
                raise ValueError("mine")

        benchmark, module = RuntimeBenchmark(), KDLightningModule(tiny_model(0), kd_weight=0.0)
        data = SRDDataModule(make_rows(8), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
        settings = {**QUIET, "default_root_dir": tmp_path, "max_epochs": 1}
        with pytest.raises(ValueError, match="mine"):
            L.Trainer(callbacks=[benchmark, Fails()], **settings).fit(module, datamodule=data)
        assert module.step.around is data._around is unwatched
        now.seconds += 1000
        L.Trainer(callbacks=[benchmark], **settings).fit(module, datamodule=data)
        assert benchmark.report["seconds"] == 0

    def test_a_checkpoint_of_an_older_version_is_none(self):
        benchmark = RuntimeBenchmark()
        benchmark.load_state_dict({"stages": {"0": {"seconds": 1.0}}, "validation": 2.0})
        assert benchmark.state_dict()["epochs"] == []


class Late:
    """A device that reaches a mark only when it is waited for, or after some more were made."""

    def __init__(self, behind):
        self.behind, self.made, self.waits = behind, 0, 0

    def mark(self):
        self.made += 1
        return self.made

    def seconds(self, start, end):
        assert max(start, end) <= self.reached, "read before it was reached"
        return float(end - start)

    @property
    def reached(self):
        return max(self.made - self.behind, getattr(self, "waited_for", 0))

    def is_past(self, mark):
        return mark <= self.reached

    def wait(self, mark):
        self.waits += 1
        self.waited_for = mark


class TestClock:
    @pytest.mark.parametrize("behind", [0, 1, 5, 1000])
    def test_marks_are_read_when_they_are_reached(self, behind):
        device = Late(behind)
        clock = PartClock(device)
        clock.start("data")  # mark 1
        for part in ("forward", "backward", "optimizer", "data") * 10:
            clock.enter(part)
        assert device.waits == 0
        taken = clock.take()
        assert taken == {"data": 11.0, "forward": 10.0, "backward": 10.0, "optimizer": 10.0}
        assert device.waits == (behind > 0)
        assert clock.take() == {"data": 1.0}

    def test_no_step_waits_for_a_gpu(self, tmp_path, monkeypatch):
        """However many steps there are, a device is waited for at the ends of epochs only."""
        waits = []
        for rows in (4, 16):
            device = Late(behind=10**6)
            monkeypatch.setattr("srd_lightning.callbacks.runtime.timeline_of", lambda _, device=device: device)
            fit(BoringModel(), DataLoader(RandomDataset(32, rows)), tmp_path, max_epochs=2)
            waits.append(device.waits)
        assert waits[0] == waits[1] <= 2 * 2 + 2

    def test_a_module_that_is_copied_goes_by_the_same_clock(self, tmp_path, monkeypatch):
        """Events cannot be copied, and averaging of weights copies the module."""

        class Single(Late):
            def __deepcopy__(self, memo):
                pytest.fail("copied")

        device, copies = Single(behind=10**6), []
        monkeypatch.setattr("srd_lightning.callbacks.runtime.timeline_of", lambda _: device)

        class Copies(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                copies.append(copy.deepcopy(pl_module.step.around))

        data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
        fit(KDLightningModule(tiny_model(), kd_weight=0.0), data, tmp_path, [Copies()], max_epochs=1)
        (around,) = copies
        assert isinstance(around.__self__, PartClock)
        assert around.__self__ is copy.deepcopy(around).__self__

    def test_parts_within_parts(self):
        clock = PartClock(Late(0))
        clock.start("forward")  # 1
        with clock.around("teacher"):  # 2
            clock.enter("teacher")  # 3
        with pytest.raises(ValueError, match="mine"), clock.around("teacher"):  # 4, 5
            raise ValueError("mine")
        clock.enter("validation")  # 6, 7
        with clock.around("teacher"):
            assert clock.part == "validation"
        assert clock.take() == {"forward": 3.0, "teacher": 3.0, "validation": 1.0}
        clock.stop()
        with clock.around("refresh"):
            clock.enter("rest")
        assert (clock.part, clock.take()) == (None, {})


class TestOperations:
    def test_of_a_tiny_llama_by_hand(self):
        block = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k, v, o; gate, up, down; two norms
        body, head = 2 * block + 32, 384 * 32
        assert Parameters.of(tiny_model()) == (body + head, 0, 0)
        assert Parameters.of(tiny_model(tie_word_embeddings=True)) == (body, 0, 0)
        model = tiny_model()
        assert Parameters.of(model).trained == model.num_parameters(exclude_embeddings=True)
        model.lm_head.requires_grad_(False)
        both = Parameters.of(model, teacher=tiny_model(1, num_hidden_layers=1))
        assert both == (body, head, block + 32 + head)
        assert both.operations(5, 3) == 5 * (6 * body + 2 * head) + 3 * 2 * (block + 32 + head)
        assert Parameters.of(torch.nn.ModuleList([model]), teacher=model).teacher == 0

    def test_of_a_work(self):
        work = Work(
            0, 0, 8, rows=6, tokens=10, responses=4, positions=12, taught=5, parts={"forward": 2.0, "rest": 1.0}
        )
        work.parts["validation"] = 100.0
        assert work.speed(Parameters(7, 0, 3), peak=100.0) == {
            "rows_per_second": 2.0,
            "response_tokens_per_second": 4 / 3,
            "positions_per_second": 4.0,
            "model_flops": 6 * 7 * 10 + 2 * 3 * 5,
            "mfu": (6 * 7 * 10 + 2 * 3 * 5) / (100 * 3),
        }

    def test_the_fastest_product_is_the_peak(self, monkeypatch):
        took = {256: 0.002, 512: 0.004, 1024: 0.04}
        monkeypatch.setattr(operations, "_seconds_of_product", lambda size, *_: took[size])
        assert measured_peak.__wrapped__(CPU, torch.float32) == 2 * 512**3 / 0.004

    def test_of_this_machine(self):
        state = torch.get_rng_state()
        assert measured_peak(CPU, torch.float32) > 0
        assert torch.equal(torch.get_rng_state(), state)
        assert measured_peak(torch.device("meta"), torch.float32) is None
        assert measured_peak(CPU, torch.int8) is None


class TestMemory:
    def test_where_linux_tells(self, tmp_path):
        (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t    9999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n")
        (tmp_path / "clear_refs").write_text("")
        assert peak_memory(CPU, tmp_path) == {"host": 2 * 2**20}
        reset_peaks(CPU, tmp_path)
        assert (tmp_path / "clear_refs").read_text() == "5"

    def test_where_nobody_tells(self, tmp_path):
        reset_peaks(CPU, tmp_path / "none")
        assert peak_memory(CPU, tmp_path / "none")["host"] > 10 * 2**20


class TestEnergy:
    @pytest.fixture
    def zones(self, tmp_path):
        def zone(name, kind, stands_at):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "name").write_text(f"{kind}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
            (tmp_path / name / "energy_uj").write_text(f"{stands_at}\n")

        return zone

    def test_of_the_processors(self, tmp_path, zones):
        zones("intel-rapl:0", "package-0", 5_000_000)
        zones("intel-rapl:0:0", "core", 5_000_000)
        zones("intel-rapl:1", "package-1", 999_000_000)
        meter = EnergyMeter(CPU, tmp_path)
        zones("intel-rapl:0", "package-0", 8_000_000)
        zones("intel-rapl:0:0", "core", 8_000_000)
        zones("intel-rapl:1", "package-1", 2_000_000)  # gone round
        assert meter.joules() == pytest.approx({"cpu": 3 + 3})
        assert meter.joules() == pytest.approx({"cpu": 6})

    def test_it_keeps_up_with_counters_that_go_round(self, tmp_path, zones, monkeypatch):
        later = [0.0]
        monkeypatch.setattr(energy.time, "monotonic", lambda: later[0])
        zones("intel-rapl:0", "package-0", 0)
        meter = EnergyMeter(CPU, tmp_path)
        for stands_at in (600_000_000, 200_000_000, 900_000_000):
            zones("intel-rapl:0", "package-0", stands_at)
            later[0] += 61
            meter.keep_up()
        assert meter.joules() == pytest.approx({"cpu": 1900})

    def test_what_may_not_be_read_is_left_out(self, tmp_path, zones):
        zones("intel-rapl:0", "package-0", 1)
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
        assert EnergyMeter(CPU, tmp_path).joules() == EnergyMeter(CPU, tmp_path / "none").joules() == {}

    def test_of_a_gpu(self, tmp_path, monkeypatch):
        stands_at = {"GPU-1234": 5000}
        nvml = SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
            nvmlDeviceGetTotalEnergyConsumption=stands_at.__getitem__,
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
        meter = EnergyMeter(torch.device("cuda", 0), tmp_path)
        stands_at["GPU-1234"] = 7500
        assert meter.joules() == {"gpu": 2.5}
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert EnergyMeter(torch.device("cuda", 0), tmp_path).joules() == {}


REPORT = {
    "seconds": 20.0,
    "parts": {"data": 4.0, "forward": 10.0, "refresh": 0.001, "rest": 5.999},
    "stages": [
        {"first_epoch": 0, "parts": {"data": 1.0, "forward": 4.0}, "padding": 0.25, "rows_per_second": 1234.5},
        {"first_epoch": 8, "parts": {"data": 3.0, "forward": 6.0}, "padding": 0.0, "mfu": 0.123},
    ],
    "host_peak_memory_bytes": 3 * 2**30,
    "energy_joules": {"gpu": 1234.0},
    "machine": {"device": "cpu", "dtype": "bfloat16", "peak_flops_per_second": 7e11},
}


class TestTable:
    def shown(self, report):
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table_of(report))
        return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]

    def test_by_hand(self):
        lines = self.shown(REPORT)
        for line in (
            "where 20.0 s went",
            "waiting for data 1.00 3.00 4.00 20.0%",
            "forward 4.00 6.00 10.00 50.0%",
            "the rest 6.00 6.00 30.0%",
            "sum 5.00 9.00 6.00 20.00",
            "rows/s 1,234.5",
            "padding 25.0% 0.0%",
            "model FLOPs used 12.3%",
        ):
            assert line in lines
        said = "host memory 3.00 GiB at most; gpu 1,234 J; products of bfloat16: 700 GFLOP/s"
        assert " ".join(lines).endswith(said)
        assert not [line for line in lines if line.startswith("refreshes")]

    def test_many_stages_are_shown_as_one(self):
        lines = self.shown({**REPORT, "stages": [REPORT["stages"][0]] * 7})
        assert "forward 10.00 50.0%" in lines

    def test_it_is_shown_at_the_end(self, tmp_path, capsys):
        for quick, shown in ((True, 0), (False, 1)):
            fit(BoringModel(), DataLoader(RandomDataset(32, 2)), tmp_path, max_epochs=1, fast_dev_run=quick)
            assert capsys.readouterr().out.count(" s went") == shown
            assert (tmp_path / "runtime.json").exists() == (tmp_path / "runtime.jsonl").exists() == bool(shown)


class Untouched(L.LightningDataModule):
    """Its rows must not be read: what is refused is refused before."""

    def setup(self, stage):
        run_preflight(self.trainer, self.trainer.lightning_module)
        pytest.fail("rows were read")


@pytest.mark.parametrize(
    ("path", "there", "content", "said"),
    [
        ("here", None, None, "must name a file, but .*here is a folder"),
        ("mine.json", "mine.json", '{"a": 1}', r"replace .*mine\.json, which does not hold the report of an earlier"),
        ("mine.jsonl", "mine.jsonl", "text", r"would replace .*mine\.jsonl, which does not hold the report"),
        ("my.json", "my.jsonl", '{"id": 1}\n', r"would replace .*my\.jsonl, which does not hold the report"),
        ("/proc/srd/report.json", None, None, "but nothing can be written to /proc"),
        ("/dev/null", None, None, "must name a file, but /dev/null is a device"),
    ],
)
def test_a_path_is_refused_before_rows_are_read(path, there, content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    if there is not None:
        (tmp_path / there).write_text(content)
    with pytest.raises(StorageError, match=said):
        L.Trainer(callbacks=[RuntimeBenchmark(path)], max_epochs=4, **QUIET).fit(BoringModel(), datamodule=Untouched())
    if there is not None:
        assert (tmp_path / there).read_text() == content


def test_training_goes_on_where_lines_can_no_longer_be_written(tmp_path):
    class Fills(L.Callback):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "runtime.jsonl").mkdir()

    with pytest.warns(UserWarning, match=r"could not write .*runtime\.jsonl"):
        report = fit(BoringModel(), DataLoader(RandomDataset(32, 2)), tmp_path, [Fills()], max_epochs=3)
    assert json.loads((tmp_path / "runtime.json").read_text()) == report
