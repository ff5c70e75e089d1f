"""`python -m experiments gpu-check`: what holds and what it costs on the GPU of this machine (docs/gpu-check.md).

options      the command's options; imports nothing heavy
command      runs one piece after the other, within its minutes
record       the JSON file that every piece is added to
sizes        models with random weights, methods, random tokens
running      prepare and train as the stages do, without files
stopwatch    times and bytes of a step, by the engine's own hooks
checks       does it compute the same here: needs no data; of kernels and of fits
waiting      where the host waits for the device
speed        seconds and bytes of full-size models with random weights
comparison   real weights before and after a short fine-tuning
"""
