# The runs of "Reading the curves": about a CPU minute each.
run() {
  .venv/bin/python examples/digits.py --iterations 300 --batch-size 32 \
    --evaluate-every 15 --samples 300 --out runs/curves/"$@"
}
# --8<-- [start:commands]
run healthy
run ttur1 --critic-steps 1 --learning-rate 2e-3
run slow --critic-learning-rate 1e-5
run fast --learning-rate 1e-2
run discbig --discriminator-weight 10
run ganbig --gan-weight 3
# --8<-- [end:commands]
