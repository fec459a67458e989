"""The operations that decide the speed of decoding and of training, one folder each.

`window_attention`: a window of queries over a key/value cache and over itself.
`unembed_stats`: hidden states to vocabulary statistics, without stored logits.
`unembed_loss`: the same for losses, differentiable.
`block_diffusion_attention`: a noisy and a clean copy of a text in one pass, for training.

A folder holds the contract and the dispatch (`op`), an obvious float32 `reference`, an `xla`
implementation, kernels where there are any (`tpu`, `gpu`) and named `shapes` of real models. Models
and loops call what its `__init__` exports, and nothing else.
"""
