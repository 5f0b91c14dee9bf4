"""n_inner equal to n_embd: the two projections of the MLP have results of one width."""

from pathlib import Path

import torch

from tests.oracle import EOS, make_checkpoint, make_engine, request, run


def test_the_mlp_does_not_write_over_what_it_reads(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, n_embd=256, n_inner=256, n_head=4)
    prompt = [3, 5, 7, 11]
    output = run(make_engine(tmp_path), [request("r", prompt, max_tokens=8, ignore_eos=True)])["r"]
    with torch.no_grad():
        truth = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS,
        )
    assert list(output.token_ids) == truth[0, 4:].tolist()
