"""A cell of the study of norms (docs/norm-study): a small model of bytes, a minute on one core.

It is small so that hundreds of them can be trained, and any one of them again. In float32, so that
every machine computes alike up to the last digits.
"""

out_dir = "out/study"
dataset = "python-bytes"  # python data/prepare.py python tokenizer=byte name=python-bytes

n_layer = 4
n_head = 2
n_embd = 64
n_hidden = 192
block_size = 128
tie_embeddings = True

batch_size = 8
max_iters = 300  # 1.3 bytes for each parameter
optimizer = "muon"
learning_rate = 2.4e-2
embed_lr = 4.0
lr_schedule = "linear"
warmup_iters = 30

eval_interval = 0  # at the end alone
eval_iters = 1000  # an eighth of the validation text
save_interval = 0
log_interval = 20
dtype = "float32"
compile = False
