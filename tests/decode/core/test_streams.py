import jax
import jax.numpy as jnp
import numpy as np

from decode.core.streams import Stream, draw_uniform, fold_in, uniforms

N = 1000
KEYS = jax.random.key_data(jax.random.split(jax.random.key(0), N))


def test_rows_purposes_and_numbers_have_streams_of_their_own():
    numbers = jnp.arange(N, dtype=jnp.uint32)
    drawn = [
        uniforms(KEYS, 2),
        *(uniforms(fold_in(KEYS, stream), 2) for stream in (Stream.DRAFT, Stream.TARGET, 7)),
        uniforms(fold_in(jnp.broadcast_to(KEYS[:1], KEYS.shape), numbers + 1), 2),
    ]
    assert len(np.unique(np.concatenate(drawn))) > 0.99 * 10 * N  # 2^23 numbers: some coincide


def test_components_draw_what_others_do_not():
    streams = (Stream.RANDOM, Stream.DREAM_QUOTA, Stream.ORIGIN, Stream.REMDM, Stream.NOISE)
    drawn = np.asarray([draw_uniform(KEYS, stream) for stream in streams])
    assert drawn.min() > 0 and drawn.max() < 1
    counts = np.apply_along_axis(lambda x: np.histogram(x, 10, (0, 1))[0], 1, drawn)
    assert (((counts - N / 10) ** 2 / (N / 10)).sum(axis=1) < 33.7).all()  # 9 degrees, 0.9999
    assert np.abs(np.corrcoef(drawn) - np.eye(len(streams))).max() < 4 / np.sqrt(N)
