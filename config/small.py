"""The default story: a small model of Python code, about three minutes on two CPU cores, no download.

It reads each byte of the standard library about once. Expect text that looks like Python and means nothing; LOG.md
has the way to these numbers.
"""

out_dir = "out/small"
dataset = "python"

n_layer = 4
n_head = 2
n_embd = 128             # so small that half of the weights are the embedding: what matters here is to see more text
n_hidden = 384           # LLaMA's rule would round 341 up to 512
block_size = 256
tie_embeddings = True

batch_size = 8           # 2,048 tokens per step: many small steps learn faster at this scale than few large ones
max_iters = 1100
optimizer = "muon"       # about twice AdamW's progress per step
learning_rate = 6e-3
embed_lr = 4.0           # rare tokens are seen seldom, so their rows move far when they are
lr_schedule = "linear"   # to zero: with so few steps nothing is gained by staying high
warmup_iters = 20

eval_interval = 550      # each takes seconds, because the whole validation split is read
save_interval = 550
log_interval = 25
sample_prompt = "class Stack:\n    def push(self, item):\n"
sample_tokens = 250
