"""GPT-2's size with LLaMA's Block, on 10 billion tokens of web pages, for one 80 GB GPU.

First: python data/prepare.py fineweb-edu (it reads about 30 GB from the network and leaves 20 GB on
the disk). Computed, not measured: about a day at 100 TFLOP/s.
"""

out_dir = "out/llama_124m"
dataset = "fineweb-edu"

n_layer = 12
n_head = 12
n_embd = 768  # LLaMA's rule makes n_hidden 2048
block_size = 1024
vocab_size = 50_304  # GPT-2's 50,257, padded to a multiple of 64, which a GPU multiplies faster
tie_embeddings = True

# 491,520 tokens per step, near the half million of GPT-3's table for this size. 480 has many
# divisors, so that a micro-batch fits each GPU well.
batch_size = 480
max_iters = 20_000  # about 10 billion tokens
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700
eval_interval = 500
eval_iters = 2048
save_interval = 1000
