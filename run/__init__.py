"""The parts of a training run. The loop itself is train.py.

setup.py      checks everything and builds the run
optim.py      the optimizers
folder.py     what a run writes into its folder
log.py        what it reports; then metrics.py, which reads and draws that
evaluate.py   the loss over fixed windows
watch.py      the scales inside the model
machine.py    what the machine can do, and what a model costs on it
signals.py    how a run is asked to stop
ranks.py      several processes; then parallel.py and sharded.py: their model, their checkpoints
"""
