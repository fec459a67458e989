"""What a training step changes, and the step: from a batch to the state after it.

`train.loop.run` calls this in a loop; `scripts.plan.compile_tpu` and `scripts.bench.train` compile
the very same step without a run around it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.params import Params, ParamSpec, abstract_from_specs, init_from_specs, spec_shardings
from dlm.sharding import constrain
from dlm.trainable import Everything, Learned, Trainable
from train import data, optimizer
from train.config import OptimConfig
from train.objectives import Context, Objective

EVERYTHING = Everything()


class TrainState(struct.PyTreeNode):
    """What a step changes.

    Attributes:
      step: scalar int32. Steps done.
      params: what is learned, in `train.master_dtype`.
      opt_state: of `train.optimizer.make_optimizer`.
      ema: moving average of `params`; None without `optim.ema_decay`.
      best: those of `averaged` that had the lowest validation loss; None without `optim.keep_best`.
      best_loss: scalar float32. That loss, at first infinite; None without `optim.keep_best`.
      is_finite: scalar bool. False once a loss or gradient was not: from then on nothing changes,
        so this is the state before that step.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    best: Params | None
    best_loss: jax.Array | None
    is_finite: jax.Array

    @property
    def averaged(self) -> Params:
        """What is validated: the moving average, if there is one."""
        return self.params if self.ema is None else self.ema

    @property
    def result(self) -> Params:
        """What is exported: the best of what was validated, or what is validated now."""
        return self.averaged if self.best is None else self.best


# ---- The step ---------------------------------------------------------------------------------


def init_state(params: Params, *, optim: OptimConfig) -> TrainState:
    """The state before the first step. Averages are of float32 at least, else they stand still."""
    averaged = None
    if optim.ema_decay:
        wide = lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
        averaged = jax.tree.map(wide, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.make_optimizer(optim).init(params),
        ema=averaged,
        best=jax.tree.map(jnp.copy, averaged or params) if optim.keep_best else None,
        best_loss=jnp.float32(jnp.inf) if optim.keep_best else None,
        is_finite=jnp.array(True),
    )


def train_step(
    state: TrainState,
    batch: data.Batch,
    key: jax.Array,
    frozen: Learned | None = None,
    *,
    cfg: ModelConfig,
    objective: Objective,
    optim: OptimConfig,
    trainable: Trainable = EVERYTHING,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of gradient descent.

    Args:
      state: before it.
      batch: see `train.objectives`.
      key: of the run.
      frozen: the model that `trainable` is learned beside, see `Trainable.attach`; it gets no
        gradient. None: nothing stays as it is.
      cfg: the model. Static, as are the following.
      objective: see `train.objectives`.
      optim: the optimiser.
      trainable: what is learned.

    Returns:
      The state after it, and scalar float32 metrics of the parameters before it: those of the
      objective, the norm of the gradient before clipping, and the learning rate.
    """
    attach = functools.partial(_attach, frozen, cfg=cfg, trainable=trainable)
    context = Context(
        key=jax.random.fold_in(key, state.step),
        progress=jnp.minimum(state.step / optim.decay_steps, 1.0),
    )
    teacher = attach(state.ema).target if objective.needs_teacher else None

    def loss_fn(own: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        learned = attach(own)
        if objective.needs_teacher:
            learned = learned.replace(beside=teacher)
        return objective.loss(learned, cfg, batch, context)

    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    grad_norm = optax.global_norm(gradient)
    tx = optimizer.make_optimizer(optim)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, trainable.rate(updates))
    step = state.step + 1
    ema = state.ema
    if ema is not None:
        averaged = optimizer.update_ema(ema, params, step // optim.accumulate, optim)
        has_updated = step % optim.accumulate == 0
        ema = jax.tree.map(lambda new, old: jnp.where(has_updated, new, old), averaged, ema)
    metrics = {
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": optimizer.learning_rate_schedule(optim)(state.step // optim.accumulate),
    }
    is_finite = state.is_finite & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new = state.replace(step=step, params=params, opt_state=opt_state, ema=ema)
    kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
    return kept.replace(is_finite=is_finite), metrics


def jit_train_step(shardings: TrainState) -> jax.stages.Wrapped:
    """`train_step`, jitted, for a state that lies as `state_shardings` says; it is given away."""
    return jax.jit(
        train_step,
        static_argnames=("cfg", "objective", "optim", "trainable"),
        donate_argnames="state",
        out_shardings=(shardings, None),
    )


def keep_best(state: TrainState, loss: jax.Array | float) -> TrainState:
    """The state, knowing that a validation of `averaged` gave this loss; `optim.keep_best` only."""
    assert state.best_loss is not None
    is_better = loss < state.best_loss
    best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), state.averaged, state.best)
    return state.replace(best=best, best_loss=jnp.where(is_better, loss, state.best_loss))


def jit_keep_best(shardings: TrainState) -> jax.stages.Wrapped:
    """`keep_best`, jitted as `jit_train_step`."""
    return jax.jit(keep_best, donate_argnames="state", out_shardings=shardings)


def valid_step(
    own: Params,
    batch: data.Batch,
    key: jax.Array,
    frozen: Learned | None = None,
    *,
    cfg: ModelConfig,
    objective: Objective,
    trainable: Trainable = EVERYTHING,
) -> dict[str, jax.Array]:
    """The objective's metrics on one held-out batch, at the end of any curriculum."""
    learned = _attach(frozen, own, cfg=cfg, trainable=trainable)
    if objective.needs_teacher:
        learned = learned.replace(beside=learned.target)
    return objective.loss(learned, cfg, batch, Context(key, 1.0, True))[1]


def _attach(
    frozen: Learned | None, own: Params | None, *, cfg: ModelConfig, trainable: Trainable
) -> Learned:
    """What the objective is given, in the model's dtype.

    They stay spread over the mesh until they are used, and so do their gradients: what travels is
    never float32.
    """

    def cast(spec: ParamSpec, x: jax.Array) -> jax.Array:
        return constrain(x.astype(spec.dtype or cfg.jnp_dtype), *spec.axes)

    own = jax.tree.map(cast, trainable.specs(cfg), own)
    return trainable.attach(cfg, frozen or Learned({}), own)


# ---- State on a mesh --------------------------------------------------------------------------


def state_shardings(specs: Params, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """A `TrainState` of shardings; moments and averages lie as their parameters do.

    Args:
      specs: `ParamSpec`s of what is learned.
      optim: the optimiser.
      mesh: where it lies.
    """
    of_params = spec_shardings(specs, mesh)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    state = abstract_state(specs, jnp.float32, optim)
    return TrainState(
        step=replicated,
        params=of_params,
        opt_state=optax.tree_map_params(
            optimizer.make_optimizer(optim),
            lambda _, sharding: sharding,
            state.opt_state,
            of_params,
            transform_non_params=lambda _: replicated,
        ),
        ema=of_params if optim.ema_decay else None,
        best=of_params if optim.keep_best else None,
        best_loss=replicated if optim.keep_best else None,
        is_finite=replicated,
    )


def abstract_state(
    specs: Params, dtype: DTypeLike, optim: OptimConfig, shardings: TrainState | None = None
) -> TrainState:
    """`jax.ShapeDtypeStruct` per array of the state, with its sharding if `shardings` are given."""
    make = functools.partial(init_state, optim=optim)
    state = jax.eval_shape(make, abstract_from_specs(specs, dtype))
    if shardings is None:
        return state
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def first_state(
    key: jax.Array,
    given: Params | None,
    specs: Params,
    dtype: DTypeLike,
    optim: OptimConfig,
    shardings: TrainState,
) -> TrainState:
    """The state before the first step, made where it belongs: fresh, or around `given` ones.

    Args:
      key: draws fresh parameters.
      given: parameters to start from; None: fresh ones.
      specs: `ParamSpec`s of what is learned.
      dtype: in which it is kept.
      optim: the optimiser.
      shardings: of `state_shardings`.
    """

    def fresh(key: jax.Array) -> TrainState:
        return init_state(init_from_specs(key, specs, dtype), optim=optim)

    def around(params: Params) -> TrainState:
        cast = lambda spec, x: x.astype(spec.dtype or dtype)  # noqa: E731
        return init_state(jax.tree.map(cast, specs, params), optim=optim)

    if given is None:
        return jax.jit(fresh, out_shardings=shardings)(key)
    return jax.jit(around, out_shardings=shardings)(jax.device_put(given, shardings.params))
