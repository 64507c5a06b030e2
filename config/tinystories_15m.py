"""The model of 15 million parameters in llama2.c's table, which tells stories, for one GPU.

First: python data/prepare.py tinystories vocab_size=32000. llama2.c reports a validation loss of
1.072 with another vocabulary of that size. Computed, not measured: four hours at 100 TFLOP/s.
"""

out_dir = "out/tinystories_15m"
dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 288
n_hidden = 768
block_size = 256
tie_embeddings = True  # the vocabulary would otherwise be counted twice
dropout = 0.1

batch_size = 512  # 131,072 tokens per step
max_iters = 100_000
learning_rate = 5e-4
warmup_iters = 1000
eval_interval = 2000
eval_iters = 1000
save_interval = 2000
