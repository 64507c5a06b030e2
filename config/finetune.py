"""Goes on from weights that exist, on your own text:
python train.py config/finetune.py init_from=RUN-OR-HUGGING-FACE-FOLDER dataset=TEXT out_dir=out/tuned
Adapters alone: add lora_rank=8 learning_rate=3e-3. Expect most of the gain in the first hundred steps.
"""

init_from = "out/small"  # decides the architecture: no knob of the model stands here; block_size may be set
out_dir = "out/finetune"

batch_size = 8
max_iters = 300
optimizer = "adamw"      # as the weights that one finds were trained
learning_rate = 3e-4     # for models of 100 million parameters; 1e-3 suits small ones, 2e-5 those of billions
warmup_iters = 20
weight_decay = 0.0       # nothing pulls the weights away from where they were

eval_interval = 50       # a small text is soon overfitted, and best.pt keeps the best of these
save_interval = 150
log_interval = 10
