"""Draws one training iteration of DMD2: the student's turn and the critic's."""

from drawing import BLUE, GREEN, ORANGE, RED, Drawing

WIDTH, HEIGHT = 450, 550


def students_turn() -> None:
    """What is generated, who scores it, which gradients reach the student."""
    d = Drawing(
        "iteration-student",
        WIDTH,
        HEIGHT,
        "Student's turn: the student makes x from its input. Noised x goes to teacher "
        "and critic, whose difference is the distribution matching gradient at x. "
        "Noised anew it goes through the critic's encoder and head; the GAN's gradient "
        "flows back through them to x. Both gradients train the student alone.",
    )
    d.text(225, 16, "Student's turn: every 5th iteration", bold=True, size=16)
    d.box(20, 44, 150, 48, "input\nx_t, t of a rung", dashed=True)
    d.arrow((170, 68), (252, 68))
    d.box(255, 40, 175, 56, "student\nlearns", ORANGE)
    d.arrow((335, 96), (335, 132))
    d.box(285, 135, 100, 40, "x")
    # Distribution matching, on the left.
    d.arrow((285, 148), (110, 148), (110, 197))
    d.text(200, 136, "+ noise", size=13)
    d.box(55, 200, 110, 38, "noisy x")
    d.arrow((75, 238), (75, 277))
    d.arrow((145, 238), (145, 256), (188, 256), (188, 277))
    d.box(15, 280, 115, 76, "teacher\nmay be guided,\nfrozen")
    d.box(140, 280, 100, 76, "critic\nfrozen\nthis turn", BLUE)
    d.arrow((72, 356), (72, 412))
    d.text(62, 384, "μ_real", anchor="end")
    d.arrow((190, 356), (190, 412))
    d.text(200, 384, "μ_fake", anchor="start")
    d.box(15, 415, 225, 58, "g = (μ_fake − μ_real) / w\nEq. 2", RED)
    # The GAN, on the right.
    d.arrow((355, 175), (355, 197))
    d.text(347, 187, "+ other noise", size=13, anchor="end")
    d.box(290, 200, 110, 38, "noisy x")
    d.arrow((345, 238), (345, 277))
    d.box(280, 280, 130, 76, "critic's encoder\nand head, frozen\nthis turn", BLUE)
    d.arrow((345, 356), (345, 412))
    d.text(355, 384, "logit", anchor="start")
    d.box(270, 415, 150, 58, "GAN loss\nEq. 4", GREEN)
    # Gradients.
    d.arrow(
        (128, 473),
        (128, 500),
        (257, 500),
        (257, 167),
        (282, 167),
        colour=RED,
        dashed=True,
        width=2,
    )
    d.arrow(
        (420, 444),
        (438, 444),
        (438, 155),
        (388, 155),
        colour=GREEN,
        dashed=True,
        width=2,
    )
    d.arrow((305, 135), (305, 99), colour=ORANGE, dashed=True, width=2)
    d.text(128, 520, "g is handed to x: no network's", colour=RED, size=13)
    d.text(128, 537, "graph is kept", colour=RED, size=13)
    d.text(345, 503, "flows through", colour=GREEN, size=13)
    d.text(345, 520, "the critic, to x", colour=GREEN, size=13)
    d.save()


def critics_turn() -> None:
    """What the critic learns from the same sample."""
    d = Drawing(
        "iteration-critic",
        WIDTH,
        HEIGHT,
        "Critic's turn: the same x, detached, is noised and denoised by the critic; the "
        "error trains the critic. Noised x and noised real images go through its encoder "
        "and head; telling them apart trains encoder and head. Nothing reaches the "
        "student or the teacher.",
    )
    d.text(225, 16, "Critic's turn: every iteration", bold=True, size=16)
    d.box(40, 44, 170, 48, "the same x\ndetached", dashed=True)
    d.box(265, 44, 150, 48, "real images\ntheir own condition", dashed=True)
    d.arrow((85, 92), (85, 147))
    d.text(77, 119, "+ noise", size=13, anchor="end")
    d.box(30, 150, 110, 38, "noisy x")
    d.arrow((185, 92), (185, 120), (235, 120), (235, 147))
    d.text(230, 108, "+ noise", size=13)
    d.box(180, 150, 110, 38, "noisy x")
    d.arrow((370, 92), (370, 147))
    d.text(378, 119, "+ noise", size=13, anchor="start")
    d.box(315, 150, 110, 38, "noisy real")
    d.arrow((85, 188), (85, 227))
    d.arrow((235, 188), (235, 227))
    d.arrow((370, 188), (370, 227))
    d.box(15, 230, 415, 100, "", BLUE)
    d.text(225, 250, "critic: one network", bold=True)
    d.text(225, 270, "learns", size=14)
    d.text(85, 312, "encoder, decoder", size=13)
    d.text(302, 312, "encoder, head", size=13)
    d.arrow((85, 330), (85, 412))
    d.text(77, 352, "μ_fake", anchor="end")
    d.arrow((235, 330), (235, 412))
    d.arrow((370, 330), (370, 412))
    d.text(302, 352, "logits")
    d.box(15, 415, 165, 58, "denoising loss\nagainst x", BLUE)
    d.box(205, 415, 225, 58, "GAN loss\nEq. 4", GREEN)
    d.arrow((120, 415), (120, 333), colour=BLUE, dashed=True, width=2)
    d.arrow((270, 415), (270, 333), colour=GREEN, dashed=True, width=2)
    d.arrow((335, 415), (335, 333), colour=GREEN, dashed=True, width=2)
    d.text(225, 503, "Nothing reaches student or teacher.", size=13)
    d.save()


def main() -> None:
    """Draws both."""
    students_turn()
    critics_turn()


if __name__ == "__main__":
    main()
