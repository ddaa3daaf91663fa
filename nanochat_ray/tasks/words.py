"""Everyday English words for the generated letter questions, short ones first."""

_TEXT = """
ant bag bed bee box boy bus cap cat cow cup day dog ear egg eye fan fig fox fun hat hen ice ink jam jar key kid leg
lid lip map mud net nut oak oil owl pan pen pie pig pot rat red rug sea sky sun tea ten toe toy tree van wax web zoo
baby ball bank barn bear bell bird blue boat body bone book boot bowl cake calm card cave city clay coal coat cold
cook corn crab crow dark deer desk dish door dove drum duck dust farm fast film fire fish five flag foot fork four
frog game gate gift girl goat gold good gray hair hall hand hard hill home hook horn kite knee lake lamb lamp leaf
lion long loud meal milk mind moon moss nail neck nest nine nose palm park path pear pink pond pool rain ring road
rock roof root rope rose salt sand seed shed ship shoe silk sing snow soap sock soft soil song soup star stem swan
tail tall tent tide tiny town wall warm wave wide wind wing wolf wood wool yard year zero album alarm angel apple
arrow beach berry black board bread brick broom brown brush cabin camel candy chair chalk cheek chess child clock
cloud coach coast color cream crown daisy dance dream dress eagle earth eight fence field flame floor flour fruit
ghost giant glass globe glove grape grass green happy heart honey horse hotel house juice knife lemon light lunch
maple melon metal money mouse movie music night ocean olive onion orange paint panda paper peach pearl phone piano
pilot plane plant plate queen quiet rabbit radio river robot salad seven sheep shelf shirt skirt smile snail snake
spoon sport sugar sweet table teeth tiger toast today tower train truck uncle water whale wheat wheel white woman
world youth zebra almond animal autumn banana basket beauty bottle branch breeze bridge bright bubble bucket butter
button camera candle canyon carpet carrot castle cheese cherry circle coffee cookie copper corner cotton cousin dinner
doctor dragon engine family farmer father finger flower forest friend garden ginger guitar hammer harbor helmet insect
island jacket jungle kitten ladder lizard market meadow mirror monkey mother mountain needle number office oyster
palace pebble pencil pepper pickle pillow planet pocket potato puzzle pyramid ribbon rocket saddle sailor salmon
school season shadow silver simple spider spring square squirrel stream street summer sunset ticket tomato tunnel
turtle valley velvet violin walnut window winter wizard yellow airport balloon bicycle blanket breakfast brother
butterfly cabbage cactus captain chicken children chimney chocolate computer crocodile curtain dolphin elephant
evening feather giraffe hamburger holiday hospital kangaroo kitchen language lantern leopard library lobster magazine
medicine messenger morning mushroom necklace notebook octopus ostrich package painting pancake parrot peacock penguin
picture pineapple popcorn present printer pumpkin railway rainbow raspberry restaurant sandwich scissors shoulder
snowflake soldier station strawberry student sunflower swimming teacher telephone thunder tractor umbrella vacation
vegetable village volcano watermelon weather whisper
"""
WORDS = tuple(_TEXT.split())

# What a tiny model can learn to write letter by letter in a minute; the tokens of a word change behind a quote mark.
_FEW = """
ant apple banana bee bird book butter cat coffee computer dog door egg fish flower fox garden honey horse house kitten
lemon letter lion moon mouse onion pepper pizza potato rabbit rain river salad school seven sheep snow spoon strawberry
sugar summer sun tomato tree water winter yellow
"""
FEW_WORDS = tuple(_FEW.split())
