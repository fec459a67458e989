"""What is minimised, one file per method.

An objective is a frozen dataclass with one method,

    loss(params, cfg, batch, key) -> (scalar float32, metrics)

where `batch` is what `train.data` makes:

    prompt: [B, P] int32. Prompts, left-padded, so that every completion starts at index P.
    prompt_start: [B] int32. Index of the first real prompt token; P if the prompt is empty.
    completion: [B, G] int32. Completions, filled up with EOS.
    completion_len: [B] int32. Tokens of the completion, its first EOS included, at most G.

`metrics` is a dict of scalar float32 arrays and holds "loss". A config names an objective by
"module:Class", so a new one is a new file and nothing else.
"""
