import dataclasses
import doctest
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from dlm.params import param_specs
from dlm.sharding import make_mesh
from dlm.trainable import Learned
from tests.lib import toys
from tests.lib.objectives import loss_of, make_batch
from tests.lib.runs import assert_same, toy_config, without_times
from tests.lib.tiers import more
from tests.lib.weights import init_params
from train import data, loop
from train import step as step_lib
from train.config import ConfigError, OptimConfig, from_config_dict
from train.metrics import read_metrics
from train.objectives import Context
from train.objectives.causal import Causal
from train.objectives.dflash import DFlashLoss
from train.objectives.masked_diffusion import MaskedDiffusion
from train.objectives.medusa import MedusaLoss
from train.workdir import hold


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight steps, and its result. Not to be written to."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.run(toy_config(), workdir)


# ---- What a run leaves behind -----------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_every_step_has_one_line(finished):
    workdir, result = finished
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "valid/loss" in line] == [4, 8]
    assert {"loss", "masked_accuracy", "grad_norm", "learning_rate"} <= lines[0].keys()
    assert lines[0]["learning_rate"] == 0  # the warm-up starts there
    assert result.step == 8 and result.metrics == lines[-1]


def test_exported_model_is_the_one_validated(finished):
    _, result = finished
    model = dlm.load(result.model_path)
    settings = from_config_dict(toy_config())
    batches = data.valid_batches(toys.Copy(split="test"), model.tokenizer, settings.data, 2)
    key = jax.random.fold_in(jax.random.key(0), 2)
    losses = [
        loss_of(MaskedDiffusion(), Learned(model.params), model.cfg, batch, context)[0]
        for i, batch in enumerate(batches)
        for context in [Context(jax.random.fold_in(key, i))]
    ]
    np.testing.assert_allclose(np.mean(losses), result.metrics["valid/loss"], rtol=1e-5)
    np.testing.assert_allclose(np.mean(losses), result.metrics["valid/nll_bound"], rtol=1e-5)
    bound = np.exp(np.mean(losses))  # not the mean of exponentials, which is larger
    np.testing.assert_allclose(bound, result.metrics["valid/perplexity_bound"], rtol=1e-5)
    assert bound < 0.999 * np.mean(np.exp(losses))
    assert model.tokenizer.encode("abc>") == [0, 1, 2, 6]


def test_running_a_finished_run_again_changes_nothing(finished, tmp_path):
    workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    again = loop.run(toy_config(), copy)
    assert again.metrics == result.metrics and again.step == 8
    weights = "model/model.safetensors"
    assert (copy / weights).read_bytes() == (workdir / weights).read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_a_finished_run_may_have_lost_its_metrics(finished, tmp_path):
    workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    file = copy / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert loop.run(toy_config(), copy).metrics == read_metrics(workdir)[-2]
    file.unlink()
    assert loop.run(toy_config(), copy) == dataclasses.replace(
        result, metrics={}, model_path=copy / "model"
    )


@pytest.mark.parametrize("noted", [4, 8, *more(None)])
def test_a_model_that_was_not_written_to_its_end_is_written_again(finished, tmp_path, noted):
    workdir, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "exported.json").unlink()
    weights = "model/model.safetensors"
    if noted is not None:
        (copy / "exported.json").write_text(json.dumps({"step": noted}))
    if noted == 8:  # somebody made room
        shutil.rmtree(copy / "model")
        (copy / "model").mkdir()
    else:  # the model of an earlier end
        (copy / weights).write_bytes(b"")
    loop.run(toy_config(), copy)
    assert (copy / weights).read_bytes() == (workdir / weights).read_bytes()
    assert json.loads((copy / "exported.json").read_text()) == {"step": 8}


def test_another_config_is_refused(finished):
    workdir, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    with pytest.raises(ConfigError, match=r"optim\.beta1 was 0\.9 and is 0\.5"):
        loop.run(toy_config(optim={**toy_config().optim, "beta1": 0.5}), workdir)
    with pytest.raises(ConfigError, match=r"num_steps=4 must be at least 8"):
        loop.run(toy_config(train__num_steps=4), workdir)
    files = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*") if path.is_file())
    assert files == [entry for entry in before if entry[0].is_file()]


def test_unwritable_workdir_comes_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loop, "_build_tasks", lambda _: pytest.fail("worked"))
    with pytest.raises(ConfigError, match="cannot be written to"):
        loop.run(toy_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.jsonl", "metrics.jsonl must be a file, which a run writes, and is a folder"),
        ("lock.json", "lock.json must be a file, which a run writes, and is a folder: move it aw"),
        ("checkpoints", "checkpoints must be a folder, which a run writes, and is a file"),
        ("model", "model must be a folder, which a run writes, and is a file: move it away or"),
    ],
)
def test_folders_in_place_of_files_come_before_any_work(tmp_path, monkeypatch, name, message):
    """And files in place of folders: neither is written over, nor found when a run has ended."""
    monkeypatch.setattr(loop, "_build_tasks", lambda _: pytest.fail("worked"))
    path = tmp_path / name
    path.mkdir() if name.endswith(("json", "jsonl")) else path.write_text("mine")
    with pytest.raises(ConfigError, match=message):
        loop.run(toy_config(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__tensor": 64}, "needs 64 devices"),
        ({"mesh__data": 3}, r"batch_size=\d+ must be a multiple of mesh.data \* mesh.fsdp = 3"),
        ({"model__max_seq_len": 8}, "max_seq_len=8 of the model must be at least .* = 9"),
        ({"model__n_kv_heads": 3}, "model: n_heads=2 must be a multiple"),
        ({"data__tokenizer": "nowhere"}, "data.tokenizer='nowhere': .* not a directory"),
        ({"data__tokenizer": "word", "data__prompt_len": 2}, r"data\.prompt_len=2"),
        ({"train__init_from": "nowhere"}, "train.init_from='nowhere'"),
        ({"model__dtype": "float64"}, "model.dtype='float64' needs .* JAX_ENABLE_X64=1"),
        ({"train__master_dtype": "float64"}, "train.master_dtype='float64' needs the environm"),
        ({"train__num_eval_batches": 100}, r"data\.valid has 512 examples"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        loop.run(toy_config(**changes), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_held_out_prompts_do_not_count_for_heads(monkeypatch):
    """Also where they are learned; for models they do."""
    for objective, judged in (
        (MedusaLoss(decay=0.5, on_prompt=True), MedusaLoss(decay=0.5)),
        (DFlashLoss(on_prompt=True), DFlashLoss()),
        (MedusaLoss(), MedusaLoss()),
        (Causal(on_prompt=True), Causal(on_prompt=True)),
        (MaskedDiffusion(), MaskedDiffusion()),
    ):
        assert objective.for_validation() == judged
    said = []

    def valid_step(own, batch, key, frozen, *, cfg, objective, trainable):
        said.append(objective)
        return {"loss": jnp.float32(0)}

    monkeypatch.setattr(loop, "valid_step", valid_step)
    settings = from_config_dict(toy_config())
    recipe = types.SimpleNamespace(objective=MedusaLoss(on_prompt=True), trainable=loop.EVERYTHING)
    model = types.SimpleNamespace(cfg=None, frozen=None)
    feed = types.SimpleNamespace(valid=[{"prompt": np.zeros((1, 2), np.int32)}])
    with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
        loop._validator(settings, recipe, model, feed, mesh)({})
    assert said == [MedusaLoss()]


def test_example():
    assert doctest.testmod(loop).failed == 0


# ---- Learning ---------------------------------------------------------------------------------


def test_loss_falls_and_the_task_is_learned(tmp_path):
    config = toy_config(
        train__num_steps=120, train__eval_every=0, checkpoint__every=0, data__batch_size=32
    )
    metrics = loop.run(config, tmp_path).metrics
    lines = read_metrics(tmp_path)
    assert lines[0]["loss"] > 1.5
    assert metrics["valid/loss"] < 0.1 and metrics["valid/masked_accuracy"] > 0.95


def test_init_from_keeps_the_model(finished, tmp_path):
    """A learning rate of zero: what comes out is what went in."""
    _, result = finished
    config = toy_config(
        train__init_from=str(result.model_path),
        train__num_steps=1,
        optim__learning_rate=0.0,
        model__d_model=64,
    )
    started = loop.run(config, tmp_path)
    ours, theirs = dlm.load(started.model_path), dlm.load(result.model_path)
    assert ours.cfg == theirs.cfg and ours.cfg.d_model == 16
    assert_same(ours.params, theirs.params)


def test_a_model_is_read_in_another_way_from_now_on(finished, tmp_path):
    """What `dlm.lm.with_mask` makes of it is what is learned, and exported."""
    config = toy_config(
        train__init_from=str(finished[1].model_path),
        train__num_steps=1,
        optim__learning_rate=0.0,
    )
    config.train.with_mask = {"mask_token": "f", "shifted_logits": True}
    with config.unlocked():
        config.data.task.letters = "abcde"
    ours, theirs = (
        dlm.load(r.model_path) for r in (loop.run(config, tmp_path / "run"), finished[1])
    )
    expected = dataclasses.replace(theirs.cfg, mask_token_id=5, shifted_logits=True)
    assert ours.cfg == expected and ours.tokenizer.mask_token_id == 5
    assert_same(ours.params, theirs.params)
    for wrong, message in (
        ({"mask_token": "zz"}, "'mask_token': 'zz'}: mask_token='zz' is no token"),
        ({"mask_token": "f", "block_len": 5}, "no published format can hold this model"),
        ({"mask": "f"}, "unexpected keyword argument 'mask'"),
    ):
        config.train.with_mask = wrong
        with pytest.raises(ConfigError, match=rf"train\.with_mask=.*{message}"):
            loop.run(config, tmp_path / "other")
    config.train.init_from = ""
    with pytest.raises(ConfigError, match=r"train\.with_mask gives one a MASK token"):
        loop.run(config, tmp_path / "other")


def test_what_is_exported_ends_and_draws_as_what_it_was(finished, tmp_path):
    """Also after a pause: an end that only generation_config.json names, and its settings."""
    shutil.copytree(finished[1].model_path, tmp_path / "model")
    said = {
        "eos_token_id": [3, dlm.load(tmp_path / "model").cfg.eos_token_id], "do_sample": True,
        "temperature": 0.6, "top_p": 0.9, "stop_strings": ["ab"],
    }  # fmt: skip
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    theirs = dlm.load(tmp_path / "model")
    assert 3 in theirs.cfg.more_eos_ids
    generation = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "stop": ("ab",)}
    config = toy_config(train__init_from=str(tmp_path / "model"), optim__decay_steps=2)
    for num_steps in (1, 2):
        config.train.num_steps = num_steps
        ours = dlm.load(loop.run(config, tmp_path / "run").model_path)
        assert ours.cfg == theirs.cfg and ours.cfg.eos_ids == theirs.cfg.eos_ids
        assert ours.generation == theirs.generation == generation


def test_bfloat16_products_with_float32_parameters(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, dtype="bfloat16")
    optim = OptimConfig(learning_rate=1e-4, decay_steps=4, end_factor=1.0)
    state = step_lib.init_state(init_params(jax.random.key(0), toy_cfg), optim=optim)
    step = jax.jit(step_lib.train_step, static_argnames=("cfg", "objective", "optim"))
    new, metrics = step(
        state, make_batch(cfg), jax.random.key(0), cfg=cfg, objective=MaskedDiffusion(), optim=optim
    )
    assert metrics["loss"].dtype == jnp.float32 and jnp.isfinite(metrics["loss"])
    assert new.params["embed"].dtype == jnp.float32
    # Updates far below the resolution of bfloat16 are not lost.
    moved = jnp.abs(new.params["embed"] - state.params["embed"]).max()
    assert 0 < moved < 2e-4


# ---- Devices ----------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, fsdp=2, tensor=2),
        *more(dict(data=8), dict(data=4, tensor=2), dict(tensor=8)),
    ],
    ids=str,
)
def test_sharded_steps_equal_unsharded(toy_cfg, axes):
    optim = OptimConfig(
        learning_rate=1e-2, decay_steps=9, accumulate=2, ema_decay=0.9, weight_decay=0.1,
        keep_best=True,
    )  # fmt: skip
    specs, batch = param_specs(toy_cfg), jax.device_get(make_batch(toy_cfg, rows=8))
    results = []
    for mesh in (make_mesh(), make_mesh(**axes)):
        with jax.set_mesh(mesh):
            shardings = step_lib.state_shardings(specs, optim, mesh)
            state = step_lib.first_state(
                jax.random.key(0), None, specs, jnp.float32, optim, shardings
            )
            step = jax.jit(
                step_lib.train_step,
                static_argnames=("cfg", "objective", "optim"),
                donate_argnames="state",
                out_shardings=(shardings, None),
            )
            for _ in range(2):
                state, metrics = step(
                    state,
                    data.to_global(batch, mesh),
                    jax.random.key(1),
                    cfg=toy_cfg,
                    objective=MaskedDiffusion(),
                    optim=optim,
                )
            state = step_lib.jit_keep_best(shardings)(state, metrics["loss"])
        results.append(jax.device_get((state.params, state.best, metrics)))
        assert_same(*jax.device_get((state.best, state.ema)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    if "fsdp" not in axes:
        return
    q = state.params["layers"]["attention"]["q"]  # [L, N, H, D]: N over tensor, D over fsdp
    assert q.sharding.shard_shape(q.shape) == (2, 2, 4, 8)
    sharded = [
        leaf.sharding.shard_shape(leaf.shape) == (2, 2, 4, 8)
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.shape == q.shape
    ]
    # Two moments and the accumulated gradients, of q and of o.
    assert len(sharded) == 6 and all(sharded)


def test_state_is_donated(toy_cfg):
    optim = OptimConfig(learning_rate=1e-2, decay_steps=9)
    state = step_lib.init_state(init_params(jax.random.key(0), toy_cfg), optim=optim)
    compiled = (
        jax.jit(
            step_lib.train_step,
            static_argnames=("cfg", "objective", "optim"),
            donate_argnames="state",
        )
        .lower(
            state,
            make_batch(toy_cfg),
            jax.random.key(0),
            cfg=toy_cfg,
            objective=MaskedDiffusion(),
            optim=optim,
        )
        .compile()
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.9 * size


# ---- Stopping and going on --------------------------------------------------------------------


def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path, monkeypatch):
    """Three steps, SIGTERM, the other five: parameters, numbers and data as if never stopped."""
    workdir, _ = finished
    calls = []

    def to_global(batch, mesh):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    original = data.to_global
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(data, "to_global", to_global)
    stopped = loop.run(toy_config(), tmp_path)
    assert stopped.step == 3 and stopped.model_path is None
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    continued = loop.run(toy_config(), tmp_path)
    assert continued.step == 8
    assert without_times(tmp_path) == without_times(workdir)
    weights = "model/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (workdir / weights).read_bytes()


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_build_tasks", lambda _: pytest.fail("worked"))
    with hold(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        loop.run(toy_config(), tmp_path)


def test_other_data_are_refused(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    noted = json.loads((copy / "data.json").read_text())
    assert noted["num_examples"] == 512
    (copy / "data.json").write_text(json.dumps({**noted, "num_examples": 511}))
    with pytest.raises(ConfigError, match=r"there were 511 .* and are 512 .*data\.json to go on"):
        loop.run(toy_config(train__num_steps=9), copy)
    assert not (copy / "lock.json").exists()
    (copy / "data.json").unlink()
    loop.run(toy_config(train__num_steps=9), copy)
    assert json.loads((copy / "data.json").read_text()) == noted


def damage(step, how):
    """Breaks a checkpoint, as a full disk or a careless copy does."""
    files = [path for path in step.rglob("*") if path.is_file()]
    if how == "no place in the data":
        next((step / "data").glob("process*")).unlink()
    elif how == "empty files":
        for file in files:
            file.write_bytes(b"")
    elif how == "no arrays":
        shutil.rmtree(step / "state" / "d")
    elif how == "empty folder":
        shutil.rmtree(step)
        step.mkdir()
    else:
        file = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "how",
    ["half a file", *more("no place in the data", "empty files", "no arrays", "empty folder")],
)
def test_a_damaged_checkpoint_is_put_aside(finished, tmp_path, caplog, how):
    """The run goes on from the one before, to the same end."""
    workdir, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "exported.json").unlink()
    damage(copy / "checkpoints" / "8", how)
    assert loop.run(toy_config(), copy).step == 8
    assert "Step 8 in" in caplog.text and "is damaged" in caplog.text
    weights = "model/model.safetensors"
    assert (copy / weights).read_bytes() == (workdir / weights).read_bytes()
    assert without_times(copy) == without_times(workdir)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["4", "8", "8.damaged"]
    damage(copy / "checkpoints" / "8", how)  # once more
    assert loop.run(toy_config(train__num_steps=9), copy).step == 9
    for step in ("8", "9"):
        damage(copy / "checkpoints" / step, how)
    with pytest.raises(ConfigError, match=r"step 9, 8 in .* cannot be read \(.*start anew$"):
        loop.run(toy_config(train__num_steps=10), copy)


@pytest.mark.exhaustive(every=4)
def test_resuming_on_another_mesh(finished, tmp_path):
    workdir, _ = finished
    loop.run(toy_config(train__num_steps=4, optim__decay_steps=8), tmp_path)
    config = toy_config(optim__decay_steps=8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    loop.run(config, tmp_path)
    ours, theirs = without_times(tmp_path), without_times(workdir)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    np.testing.assert_allclose(ours[-1]["loss"], theirs[-1]["loss"], rtol=1e-3)
