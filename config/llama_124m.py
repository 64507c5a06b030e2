"""GPT-2's size with LLaMA's block, on 10 billion tokens of the web: one 80 GB GPU for a day or two.

First: python data/prepare.py fineweb-edu (streams about 30 GB, ends with 20 GB on disk).
"""

out_dir = "out/llama_124m"
dataset = "fineweb-edu"

n_layer = 12
n_head = 12
n_embd = 768           # LLaMA's rule gives a feed-forward of 2048
block_size = 1024
vocab_size = 50_304    # GPT-2's 50,257 padded to a multiple of 64, which GPUs multiply faster
tie_embeddings = True

batch_size = 512       # 524,288 tokens per step, as in GPT-3's table
max_iters = 19_000     # about 10 billion tokens
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700
eval_interval = 500
eval_iters = 2048
save_interval = 1000
