"""The two operations that decide decoding speed.

`kernels_pallas.window_attention`: a window of queries over a key/value cache and over itself.
`kernels_pallas.unembed_stats`: hidden states to vocabulary statistics, without stored logits.

Each module holds the contract, an obvious float32 reference, an XLA implementation and the
dispatch between them; models and loops call nothing else.
"""
