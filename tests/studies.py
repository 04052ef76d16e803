"""Two small protocols of the digits."""

from lwm.experiments.protocols import METHODS, Protocol

FIVE = Protocol("about", "digits", slice(0, 10), (2,) * 5, "--epochs 1", METHODS, shuffle=True)
TINY = Protocol(
    about="digits in three tasks",
    dataset="digits",
    pool=slice(0, 6),
    groups=(2, 2, 2),
    flags="--model resnet32 --image-size 8 --epochs 1 --calibration 0",
    methods={"lwf": "--method lwf", "lwm": "--method lwm"},
)
