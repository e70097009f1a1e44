"""Small decodes for compute-sanitizer, with CuPy alone: python -m tests.gpu.sanitizer_cases

Run by test_decode.py under the sanitizer's tools, which slow a kernel down a hundredfold: so every row tile that
differs in structure, units that several lanes share, requests without tokens, and little more.
"""

from __future__ import annotations

import numpy as np

from etap_rt import mla_decode
from tests.cache_model import host, to_cupy
from tests.cases import Case, assert_close, prepared

CASES = (
    Case("8 rows, units of several lanes", lengths=(1000, 0, 65), heads=8),
    Case("16 rows, one unit of all lanes", dtype="float16", lengths=(9000,)),
    Case("16 rows, more units than lanes", lengths=tuple(29 * i % 131 for i in range(140)), latent_dim=256),
    Case("64 rows, two tiles of them, masked", lengths=(0, 3, 500), heads=40, s_q=2, split_q=True, split_cache=True),
)


def main() -> None:
    for case in CASES:
        inputs, exact_out, exact_lse = prepared(case)
        out, lse = mla_decode(**inputs.on(to_cupy), return_lse=True)
        assert_close(case, host(out), host(lse), exact_out, exact_lse)
        print(f"{case}: in tolerance, norm {np.linalg.norm(exact_out):.4g}")


if __name__ == "__main__":
    main()
