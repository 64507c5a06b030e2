"""The shape of Llama 2 7B, but with GPT-2's vocabulary, for many GPUs. Nobody has run it yet.

First: python data/prepare.py fineweb-edu. Weights, gradient and optimizer take 110 GB, so FSDP
divides them among the GPUs. Computed: 720 days at 100 TFLOP/s, divided by the number of GPUs.
"""

out_dir = "out/llama_7b"
dataset = "fineweb-edu"

n_layer = 32
n_head = 32
n_embd = 4096
n_hidden = 11008
block_size = 4096
vocab_size = 50_304  # GPT-2's 50,257, padded to a multiple of 64

batch_size = 1024  # 4,194,304 tokens per step, as for Llama
max_iters = 32_000  # 134 billion tokens: twenty per parameter
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 2000
parallel = "fsdp"
eval_interval = 500
eval_iters = 1024
save_interval = 500
