"""nanoGPT's small character model for a CPU, with LLaMA's block and a 2026 recipe: seconds where that takes minutes.

First: python data/prepare.py shakespeare; or any text of about 1 MB: python data/prepare.py TEXT tokenizer=char
name=mine, and dataset=mine. nanoGPT's README needs 12 flags for its model and reports a validation loss of 1.88.
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare"

n_layer = 4
n_head = 2               # as many weights as with 4, but wider products, which a CPU likes better
n_embd = 128
n_hidden = 384           # LLaMA's rule would round 341 up to 512
block_size = 64

batch_size = 16
max_iters = 180          # ten seconds; eight times as many take as long as nanoGPT's run, and are much better
optimizer = "muon"
learning_rate = 1.6e-2
embed_lr = 4.0           # a character is one row of the embedding, and 180 steps are few
muon_momentum = 0.85     # so short a run has no time to average over 20 steps
lr_schedule = "linear"   # to zero
warmup_iters = 10

eval_interval = 0        # at the end only: the whole validation split
save_interval = 0
log_interval = 20
sample_tokens = 200
