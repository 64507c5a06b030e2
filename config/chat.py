"""Goes on from weights that exist, on conversations of your own:

    python train.py config/chat.py init_from=FOLDER dataset=TALKS.jsonl out_dir=out/chat

FOLDER is a run's or a Hugging Face folder. Each line of TALKS.jsonl has `messages`, or `prompt` and
`completion`. Only the answers are learned. To train adapters alone, add lora_rank=8
learning_rate=3e-3.
"""

# The weights decide the architecture, so of the model's knobs only block_size may be set here.
init_from = "out/small"
out_dir = "out/chat"

# A window holds several conversations, and none of them sees another.
doc_mask = True
doc_windows = True

batch_size = 8
max_iters = 300
optimizer = "adamw"  # with which most published weights were trained
# This rate suits 100 million parameters; try 1e-3 for small models, 2e-5 for billions.
learning_rate = 3e-4
warmup_iters = 20
weight_decay = 0.0  # nothing shall pull the weights towards zero, away from where they began

# Few conversations are soon overfitted. best.pt keeps the best of these evaluations.
eval_interval = 50
save_interval = 150
log_interval = 10
sample_tokens = 0  # a sample would continue a text; python sample.py out/chat chat=true talks
