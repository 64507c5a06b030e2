"""360 million parameters, context 2048, for one 80 GB GPU.

First: python data/prepare.py fineweb-edu. Computed, not measured: three days at 100 TFLOP/s.
"""

out_dir = "out/llama_350m"
dataset = "fineweb-edu"

n_layer = 24
n_head = 16
n_embd = 1024  # LLaMA's rule makes n_hidden 2816
block_size = 2048
vocab_size = 50_304  # GPT-2's 50,257, padded to a multiple of 64
tie_embeddings = True

batch_size = 240  # 491,520 tokens per step; many divisors, so that a micro-batch fits each GPU
max_iters = 20_000  # about 10 billion tokens
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 700
eval_interval = 500
eval_iters = 1024
save_interval = 1000
