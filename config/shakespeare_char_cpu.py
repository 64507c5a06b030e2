"""nanoGPT's small character model for a CPU, with LLaMA's Block, Muon and a linear schedule.

First: python data/prepare.py shakespeare. Any other text of about 1 MB will do:
python data/prepare.py TEXT tokenizer=char name=mine, and dataset=mine. On two CPU cores it takes
10 to 40 seconds, and nanoGPT 70 to 200 for a slightly higher loss (docs/speed.md).

With a minute and a half on a fast pair of cores, block_size=256 batch_size=8 max_iters=1450
reaches 1.44 instead of 1.87 nats per character.
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare"

n_layer = 4
n_head = 2  # nanoGPT has 4; two wider heads have as many weights and are faster on a CPU
n_embd = 128
n_hidden = 384  # LLaMA's rule would round 341 up to 512
block_size = 64
induction_init = True  # one head begins by looking one character back, the other by looking two

batch_size = 16
max_iters = 140  # more steps make the loss much lower
optimizer = "muon"
learning_rate = 1.6e-2
embed_lr = 4.0  # a character has one row of the embedding, which must move far in 140 steps
muon_momentum = 0.85  # the usual 0.95 averages over 20 steps, which is long for so short a run
lr_schedule = "linear"  # to zero
warmup_iters = 10

eval_interval = 0  # only at the end, on the whole validation split
save_interval = 0
log_interval = 20
sample_tokens = 200
