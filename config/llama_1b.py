"""The shape of Llama 3.2 1B, but with GPT-2's vocabulary of 50 thousand instead of its 128
thousand.

First: python data/prepare.py fineweb-edu. Weights, gradient and optimizer take 17 GB. Computed, not
measured: 18 days at 100 TFLOP/s, divided by the number of GPUs.
"""

out_dir = "out/llama_1b"
dataset = "fineweb-edu"

n_layer = 16
n_head = 32
n_kv_head = 8  # four query heads share one key/value head
n_embd = 2048
n_hidden = 8192
block_size = 2048
rope_theta = 500_000.0
vocab_size = 50_304  # GPT-2's 50,257, padded to a multiple of 64
tie_embeddings = True

batch_size = 480  # 983,040 tokens per step; many divisors, so that a micro-batch fits each GPU
max_iters = 21_000  # about 20 billion tokens: twenty per parameter
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 1000
eval_interval = 500
eval_iters = 1024
save_interval = 500
