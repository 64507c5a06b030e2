"""Seconds on any CPU: to see that everything works, and for the tests. Expect noise that has heard of Python."""

out_dir = "out/tiny"
dataset = "python"
n_layer = 2
n_head = 2
n_embd = 64
n_hidden = 128       # LLaMA's rule rounds up to 256s: too coarse at this width
block_size = 64
batch_size = 8
max_iters = 50
warmup_iters = 5
eval_interval = 25
eval_iters = 16      # windows; all of them would take longer than the training
save_interval = 25
log_interval = 5
sample_tokens = 64
