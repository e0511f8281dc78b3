"""Draws the critic with its head, and the two ways to a few-step student's input."""

from drawing import BLUE, GREEN, ORANGE, RED, Drawing


def critic_with_head() -> None:
    """One network, two answers."""
    d = Drawing(
        "gan",
        660,
        250,
        "Generated and real samples are noised. Both go through the critic's encoder and "
        "from there into the head, which gives one logit a sample. Generated samples "
        "also go on through the decoder, which gives the denoised estimate.",
    )
    d.box(10, 30, 120, 48, "generated x\n+ noise", ORANGE)
    d.box(10, 150, 120, 48, "real image\n+ noise", dashed=True)
    d.arrow((130, 54), (207, 54), colour=ORANGE)
    d.arrow((130, 174), (207, 174))
    d.box(190, 15, 270, 215, "", BLUE)
    d.text(325, 215, "critic", colour=BLUE, bold=True)
    d.box(210, 30, 110, 165, "encoder,\nmiddle block", BLUE)
    d.arrow((320, 54), (347, 54), colour=ORANGE)
    d.box(350, 30, 95, 48, "decoder", BLUE)
    d.arrow((320, 165), (347, 165))
    d.arrow((320, 180), (347, 180), colour=ORANGE)
    d.box(350, 148, 95, 48, "head", GREEN)
    d.arrow((445, 54), (507, 54), colour=ORANGE)
    d.box(510, 30, 140, 48, "estimate\nof the clean x", BLUE)
    d.arrow((445, 172), (507, 172))
    d.box(510, 148, 140, 48, "logit\n> 0 means real", GREEN)
    d.text(580, 92, "denoising loss", size=13)
    d.text(580, 212, "GAN loss, Eq. 4", size=13)
    d.save()


def students_inputs() -> None:
    """The student's own chain, and noised data in its place."""
    d = Drawing(
        "multi-step",
        700,
        330,
        "Four calls of the student at 999, 749, 499 and 249, with fresh noise added to "
        "its estimate between them. Backward simulation takes a training input from this "
        "chain; noised data would take a real image with noise instead.",
    )
    d.text(10, 14, "Sampling, and backward simulation", bold=True, anchor="start")
    d.text(10, 218, "Noised data, what it replaces", bold=True, anchor="start")
    lefts = (10, 185, 360, 535)
    for i, (x, time) in enumerate(zip(lefts, (999, 749, 499, 249), strict=True)):
        words = "pure noise" if i == 0 else "noisy input"
        colour = RED if i == 2 else "currentColor"
        d.box(x, 34, 110, 46, f"{words}\nt = {time}", colour, dashed=i != 2)
        d.arrow((x + 55, 80), (x + 55, 105))
        d.box(x, 108, 110, 32, "student", ORANGE)
        if i < 3:
            d.arrow((x + 110, 124), (x + 145, 124), (x + 145, 57), (x + 172, 57))
            d.text(x + 140, 94, "+ noise", size=12, anchor="end")
    d.text(160, 160, "no gradients up to here", size=13)
    d.arrow((415, 140), (415, 165), colour=RED)
    d.text(415, 180, "x: to the losses (rung 2 was drawn)", colour=RED, size=13)
    d.arrow((590, 140), (590, 165))
    d.text(590, 180, "sample", size=13)
    d.box(185, 240, 110, 46, "real image", dashed=True)
    d.arrow((295, 263), (357, 263))
    d.text(325, 252, "+ noise", size=12)
    d.box(360, 240, 110, 46, "noisy input\nt = 499", RED)
    d.arrow((470, 263), (532, 263))
    d.box(535, 247, 110, 32, "student", ORANGE)
    d.text(350, 308, "Trained so, the student never sees its own mistakes.", size=13)
    d.save()


def main() -> None:
    """Draws both."""
    critic_with_head()
    students_inputs()


if __name__ == "__main__":
    main()
