"""Instructions of the inner loop are counted in a disassembly: here one that was written by hand."""

from visionattn.tools import instructions

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   IMAD.WIDE R2, R0, 0x4, R2 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   LDG.E.U16 R7, desc[UR4][R2.64+0x2] ;
        /*0060*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   NANOSLEEP 0x20 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_the_loop_is_what_leads_back_to_its_start():
    """Not what jumps back into its middle, as code for a rare case does, that lies behind the end."""
    counts = instructions._count(CODE)
    assert counts["instructions"] == 9
    assert (counts["matrix"], counts["integer"], counts["load_16"], counts["load_128"]) == (1, 2, 1, 1)
    assert counts["macs_per_instruction"] == round(16 * 8 * 16 / 9, 1)


def test_without_a_loop_all_is_counted():
    assert instructions._count(CODE.replace("@P1 BRA `(.L_x_0)", "NOP"))["instructions"] == 12


def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "found.csv").touch()
    assert instructions.main(["--out", str(tmp_path / "found.csv")]) == 2
    assert "results are never overwritten" in capsys.readouterr().err
