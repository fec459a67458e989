"""Small GGUF files, written by the gguf package as converters do."""

import itertools

import gguf
import numpy as np

# Tensors of published directories -> theirs.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.q_proj.bias": "blk.{}.attn_q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "blk.{}.attn_k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "blk.{}.attn_v.bias",
    "model.layers.{}.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.layers.{}.self_attn.o_proj.bias": "blk.{}.attn_output.bias",
    "model.layers.{}.mlp.gate_proj.bias": "blk.{}.ffn_gate.bias",
    "model.layers.{}.mlp.up_proj.bias": "blk.{}.ffn_up.bias",
    "model.layers.{}.mlp.down_proj.bias": "blk.{}.ffn_down.bias",
    "model.layers.{}.mlp.gate.weight": "blk.{}.ffn_gate_inp.weight",
    "model.layers.{}.block_sparse_moe.gate.weight": "blk.{}.ffn_gate_inp.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.transformer.wte.weight": "token_embd.weight",
    "model.transformer.blocks.{}.attn_norm.weight": "blk.{}.attn_norm.weight",
    "model.transformer.blocks.{}.q_proj.weight": "blk.{}.attn_q.weight",
    "model.transformer.blocks.{}.k_proj.weight": "blk.{}.attn_k.weight",
    "model.transformer.blocks.{}.v_proj.weight": "blk.{}.attn_v.weight",
    "model.transformer.blocks.{}.attn_out.weight": "blk.{}.attn_output.weight",
    "model.transformer.blocks.{}.ff_norm.weight": "blk.{}.ffn_norm.weight",
    "model.transformer.blocks.{}.ff_proj.weight": "blk.{}.ffn_gate.weight",
    "model.transformer.blocks.{}.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.transformer.blocks.{}.ff_out.weight": "blk.{}.ffn_down.weight",
    "model.transformer.ln_f.weight": "output_norm.weight",
    "model.transformer.ff_out.weight": "output.weight",
}

# Tensors of single experts -> theirs, of all of a layer.
EXPERTS = {
    "model.layers.{}.mlp.experts.{expert}.gate_proj.weight": "blk.{}.ffn_gate_exps.weight",
    "model.layers.{}.mlp.experts.{expert}.up_proj.weight": "blk.{}.ffn_up_exps.weight",
    "model.layers.{}.mlp.experts.{expert}.down_proj.weight": "blk.{}.ffn_down_exps.weight",
    "model.layers.{}.block_sparse_moe.experts.{expert}.w1.weight": "blk.{}.ffn_gate_exps.weight",
    "model.layers.{}.block_sparse_moe.experts.{expert}.w3.weight": "blk.{}.ffn_up_exps.weight",
    "model.layers.{}.block_sparse_moe.experts.{expert}.w2.weight": "blk.{}.ffn_down_exps.weight",
}

BYTES = [
    *(chr(b) for b in range(256) if 0x21 <= b < 0x7F or (b >= 0xA1 and b != 0xAD)),
    *(chr(256 + n) for n in range(68)),
]

# A byte-level tokenizer of 260 tokens: bytes, then end-of-text, MASK, and two merged pieces.
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*BYTES, "<|end|>", "<|mask|>", "ab", "Ġab"],
    "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ ab"],
    "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.ggml.mask_token_id": 257,
}


def renamed(tensors, num_layers):
    """Tensors of a published directory under the names of GGUF."""
    of_experts = {}
    for layer in range(num_layers):
        for name, new in EXPERTS.items():
            names = (name.format(layer, expert=expert) for expert in itertools.count())
            found = [tensors[n] for n in itertools.takewhile(tensors.__contains__, names)]
            if found:
                of_experts[new.format(layer)] = np.stack(found)
    return of_experts | {
        NAMES[name].format(layer): tensors[name.format(layer)]
        for name in NAMES
        for layer in (range(num_layers) if "{}" in name else (0,))
        if name.format(layer) in tensors
    }


def to_neighbours(rows, num_heads):
    """Rows of queries or keys, in the order in which converters write them for Llama."""
    head = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(head.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(path, metadata, tensors):
    """Writes a file.

    Args:
      path: the file.
      metadata: key -> bool, int (uint32), float (float32), str, or list of these.
      tensors: name -> float array; or (uint8 rows of blocks, kind).
    """
    metadata = dict(metadata)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_metadata(cfg, name, **changes):
    """What a converter writes about a model, with changes; None leaves a key out."""
    metadata = {
        "general.architecture": name,
        f"{name}.context_length": cfg.max_seq_len,
        f"{name}.embedding_length": cfg.d_model,
        f"{name}.block_count": cfg.n_layers,
        f"{name}.feed_forward_length": cfg.d_ff,
        f"{name}.attention.head_count": cfg.n_heads,
        f"{name}.attention.head_count_kv": cfg.n_kv_heads,
        f"{name}.attention.key_length": cfg.head_dim,
        f"{name}.attention.value_length": cfg.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        f"{name}.rope.freq_base": float(cfg.rope_theta),
        f"{name}.rope.dimension_count": cfg.head_dim,
        "general.quantization_version": 2,
        **TOKENIZER,
        **changes,
    }
    return {key: value for key, value in metadata.items() if value is not None}
