"""The default: a small model of Python code, trained for three minutes, best on two CPU cores.

Nothing is downloaded, because the text is the standard library of the Python that runs it. Expect
text that looks like Python and means nothing. docs/LOG.md tells how these numbers were found.
"""

out_dir = "out/small"
dataset = "python"

n_layer = 3
n_head = 3
n_embd = 192
n_hidden = 512
block_size = 512
rope_theta = 5e5  # more channels that hardly turn, by which a token is found again far away
induction_init = True  # or it would begin to copy late or not at all, as the seed decides
tie_embeddings = True

# 2,048 tokens per step. At this size many small steps learn faster than few large ones.
batch_size = 4
max_iters = 0  # as many as these minutes allow
minutes = 3
optimizer = "muon"  # in 300 steps it came much further than AdamW
muon_momentum = 0.9
learning_rate = 6e-3
# Most tokens are rare, so a row of the embedding is updated seldom and must move far.
embed_lr = 4.0
beta2 = 0.99  # of AdamW, which trains the embedding: a rare token's last gradients are far apart
lr_schedule = "linear"  # to zero: with so few steps it does not pay to stay high
warmup_iters = 20

eval_interval = 1000  # an evaluation takes seconds, because it reads the whole validation split
save_interval = 500
log_interval = 25
sample_prompt = "class Stack:\n    def push(self, item):\n"
sample_tokens = 250
