"""Everything a user sets. Edit this page and run the scripts, or give the flag of the same name, which wins.

None means the recommended value for the data set and its images; the script says which value that is when it uses it.
"""
# ruff: noqa: SIM905

# The classes of CIFAR-100 in alphabetical order, in groups to choose from: OLD_CLASSES = select_classes_0_10.
select_classes_2_1 = "apple aquarium_fish".split()
select_classes_2_2 = "baby bear".split()
select_classes_0_10 = "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle".split()
select_classes_10_20 = "bowl boy bridge bus butterfly camel can castle caterpillar cattle".split()
select_classes_20_30 = "chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur".split()
select_classes_30_40 = "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard".split()
select_classes_40_50 = "lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain".split()
select_classes_50_60 = "mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree".split()
select_classes_60_70 = "plain plate poppy porcupine possum rabbit raccoon ray road rocket".split()
select_classes_70_80 = "rose sea seal shark shrew skunk skyscraper snail snake spider".split()
select_classes_80_90 = "squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor".split()
select_classes_90_100 = "train trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()

# What is learned. Every count follows from these two lists.
DATASET = "digits"  # digits (embedded), cifar10, cifar100 (downloaded), or folder (DATA_DIR/{train,test}/<class>/)
DATA_DIR = "data"  # where the images lie, or are downloaded to; digits need none
OLD_CLASSES = ["0", "1"]  # names of the classes that the teacher learns
NEW_CLASSES = ["2", "3"]  # names of the classes that the student learns on top; ["all"]: every new one

# The network.
MODEL = None  # resnet18, resnet32, resnet110, one of torchvision (mobilenet_v2), timm/<name>, or your own file.py:build
IMAGE_SIZE = None  # px; images are scaled and cut to this square
STEM = None  # how a ResNet-18 begins: imagenet, unpooled, fine or cifar, each with finer maps and slower than the last
MEAN = None  # of the channels, 0..1, as [0.485, 0.456, 0.406]; None: the training images', or with --weights ImageNet's
STD = None  # likewise their standard deviation

# The method: L = L_C + BETA * L_D + GAMMA * L_AD.
METHOD = None  # closed-form (no training), finetune, frozen, lwf, lwf-mc or lwm; None: docs/closed-form.md says which
LOSS_FORM = None  # binary or softmax; None: the form that belongs to METHOD, or that of the teacher
FAVOUR = "balanced"  # what new outputs in closed form favour: old, balanced or new
NEW_ROWS = None  # how a training's new outputs begin: random, or closed-form (None: for a pretrained teacher)
BETA = None  # weight of the logits' distillation, L_D
GAMMA = None  # weight of the attention distillation, L_AD
TEMPERATURE = 2.0  # of softmax distillation
BATCH_NORM = None  # and dropout, of the student: train, or frozen as in its teacher; None: frozen after pretrained ones

# The training.
EPOCHS = None  # passes over the training images; 0 with --weights: the teacher is taken as it is
BATCH_SIZE = None  # images in a step of the optimiser
LR = None  # learning rate of the teacher, the peak of a cosine schedule
WARM_UP = None  # share of the steps in which the rate rises to its peak
INCREMENTAL_LR = None  # likewise of the student
BACKBONE_LR = None  # learning rate of everything but the head; None: the same as the head's
FREEZE = 0  # the first so many stages of the network are not trained, as people do with few images
BALANCED = False  # draw the classes equally often, for folders in which they have unequal numbers of images
MOMENTUM = 0.9  # of SGD
WEIGHT_DECAY = None  # of all parameters
FLIP = None  # mirror training images at random; never for digits, whose mirror images are no digits
PRECISION = "auto"  # fp32, bf16 for the networks' passes (losses stay fp32), or auto: bf16 if the hardware has it
CACHE_DIR = "cache"  # where the decoded images of a folder are kept; can be deleted
SKIP_BAD_IMAGES = False  # count images that cannot be read, instead of stopping at the first
HOLD_BACK = 0.0  # judge on this share of the training images, held back, to choose settings without the test images
CALIBRATION = 0.1  # share of training images set apart to calibrate probabilities; 0: none
SEED = 0  # of initialisation, order and augmentation
DEVICE = "auto"  # auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N
DETERMINISTIC = False  # ask torch for deterministic algorithms on a GPU, somewhat slower; a CPU needs none

STATISTICS = True  # keep mean and covariance of the classes' features in the checkpoint, for the classifiers
CLASSIFIER = "auto"  # what predicts: auto, head, ncm, lda or aligned (docs/classifiers.md)

# The run.
SAVE_INTERVAL = 5  # epochs between saves; the test accuracy is read at each save
SAVE_INTERVAL_STEPS = 0  # steps of the optimiser between saves inside an epoch, for long epochs; 0: none
RESUME = False  # go on from the checkpoint of an earlier run
OVERWRITE = False  # replace the model of an earlier run
QUIET = False  # print results, warnings and errors alone
JSON = False  # stdout has the accuracies as one JSON object, for programs; all else goes to stderr
TENSORBOARD = False  # scalars, settings and maps for TensorBoard, in OUTPUT_DIR/tensorboard
OUTPUT_DIR = "runs/first"  # models, logs, figures and metrics go there
