"""nanoGPT's character model of Shakespeare with LLaMA's Block, for one GPU.

First: python data/prepare.py shakespeare. nanoGPT reports a best validation loss of 1.4697 for its
model of this size. Not measured here.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare"

n_layer = 6
n_head = 6
n_embd = 384
n_hidden = 1024  # 8/3 of n_embd: as many weights as nanoGPT's 4 n_embd without a gate
block_size = 256
dropout = 0.2  # 1 MB of text is read many times

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # a step has few tokens, so its gradient is noisy and the average must be longer
eval_interval = 250  # often, because the model overfits: best.pt is the checkpoint to sample from
save_interval = 1000
