"""A run of a few seconds on any CPU, to see that everything works; the tests use it, too.

It learns almost nothing: expect noise with some words of Python in it.
"""

out_dir = "out/tiny"
dataset = "python"
n_layer = 2
n_head = 2
n_embd = 64
n_hidden = 128  # LLaMA's rule rounds up to a multiple of 256, which is too coarse at this width
block_size = 64
batch_size = 8
max_iters = 50
warmup_iters = 5
eval_interval = 25
eval_iters = 16  # to read all windows would take longer than the training
save_interval = 25
log_interval = 5
sample_tokens = 64
