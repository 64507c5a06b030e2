"""Fine-tuning: go on from weights that exist, on another text, with a lower learning rate and the order of names that
you would give on the command line: init_from=RUN-OR-FOLDER dataset=TEXT out_dir=out/tuned. With lora_rank=8 only small
adapters are trained; they bear ten times the learning rate.
"""

init_from = "out/small"  # decides the architecture, so no knob of the model stands here; block_size may be lowered
out_dir = "out/finetune"

batch_size = 8
max_iters = 300
optimizer = "adamw"      # its step is small where gradients are, so what the weights know is kept
learning_rate = 3e-4     # a tenth of what training from scratch would take
min_lr = 3e-5
warmup_iters = 20
weight_decay = 0.0       # nothing pulls the weights away from where they were

eval_interval = 50       # a small text is soon overfitted, and best.pt keeps the best of these
save_interval = 150
log_interval = 10
