"""The tables of what the tiny model knows: only data, no logic.

Everything a question may ask by heart stands here, so that a right answer is a matter of looking it up.
Held-out words and names (`UNSEEN_*`) never reach the training set; `data.py` and `train.py` check that.
"""

CAPITALS = dict(
    pair.split("=")
    for pair in (
        "France=Paris,Italy=Rome,Spain=Madrid,Germany=Berlin,Portugal=Lisbon,Greece=Athens,Austria=Vienna,"
        "Poland=Warsaw,Norway=Oslo,Sweden=Stockholm,Finland=Helsinki,Denmark=Copenhagen,Ireland=Dublin,"
        "Belgium=Brussels,Hungary=Budapest,Iceland=Reykjavik,Japan=Tokyo,China=Beijing,India=New Delhi,"
        "Thailand=Bangkok,Vietnam=Hanoi,Egypt=Cairo,Kenya=Nairobi,Ghana=Accra,Morocco=Rabat,Peru=Lima,"
        "Chile=Santiago,Cuba=Havana,Canada=Ottawa,Mexico=Mexico City,Argentina=Buenos Aires,Brazil=Brasília,"
        "Australia=Canberra,Turkey=Ankara,Russia=Moscow,Ukraine=Kyiv,Romania=Bucharest,Croatia=Zagreb,"
        "Serbia=Belgrade,Bulgaria=Sofia,Estonia=Tallinn,Latvia=Riga,Nepal=Kathmandu,Iran=Tehran,Iraq=Baghdad,"
        "Indonesia=Jakarta,Ecuador=Quito,Colombia=Bogotá,Uruguay=Montevideo,Senegal=Dakar"
    ).split(",")
)

COLOURS = dict(
    grass="green", snow="white", coal="black", blood="red", gold="yellow", milk="white", chocolate="brown",
    salt="white", spinach="green", butter="yellow", ink="blue", rust="orange", ivory="white", soot="black",
)

SOUNDS = dict(
    cow="moo", dog="woof", cat="meow", duck="quack", sheep="baa", pig="oink", horse="neigh", bee="buzz",
    lion="roar", snake="hiss", owl="hoot", frog="ribbit", hen="cluck", mouse="squeak",
)

LEGS = dict(spider=8, dog=4, hen=2, bee=6, horse=4, snake=0, ant=6, duck=2, frog=4, crab=10)

YOUNG = dict(
    dog="a puppy", cat="a kitten", cow="a calf", sheep="a lamb", horse="a foal", duck="a duckling",
    hen="a chick", pig="a piglet", bear="a cub", goat="a kid", swan="a cygnet", frog="a tadpole",
)

OPPOSITES = dict(
    hot="cold", big="small", day="night", up="down", left="right", fast="slow", old="young", rich="poor",
    open="closed", light="dark", wet="dry", hard="soft", early="late", full="empty", near="far", high="low",
    happy="sad", strong="weak", loud="quiet", first="last",
)

SYMBOLS = dict(
    gold="Au", silver="Ag", iron="Fe", oxygen="O", hydrogen="H", carbon="C", helium="He", copper="Cu",
    sodium="Na", lead="Pb", tin="Sn", zinc="Zn", calcium="Ca", neon="Ne",
)

# (language, English) -> word. Several need more than one byte a letter, so that streams of bytes are tested.
TRANSLATIONS = {
    ("French", "cat"): "chat", ("French", "coffee"): "café", ("French", "school"): "école",
    ("French", "summer"): "été", ("French", "boy"): "garçon", ("French", "forest"): "forêt",
    ("German", "bridge"): "Brücke", ("German", "door"): "Tür", ("German", "street"): "Straße",
    ("German", "key"): "Schlüssel", ("German", "bear"): "Bär", ("German", "water"): "Wasser",
    ("Spanish", "tomorrow"): "mañana", ("Spanish", "water"): "agua", ("Spanish", "tree"): "árbol",
    ("Spanish", "child"): "niño", ("Japanese", "cat"): "猫", ("Japanese", "water"): "水",
    ("Japanese", "mountain"): "山", ("Japanese", "dog"): "犬", ("Japanese", "thanks"): "ありがとう",
    ("Russian", "hello"): "привет", ("Russian", "water"): "вода", ("Russian", "cat"): "кот",
    ("Greek", "sea"): "θάλασσα", ("Greek", "sun"): "ήλιος", ("Polish", "hand"): "ręka",
    ("Turkish", "flower"): "çiçek",
}

EMOJI = dict(
    cat="🐱", dog="🐶", sun="☀️", moon="🌙", heart="❤️", fire="🔥", star="⭐", tree="🌳", fish="🐟",
    apple="🍎", rocket="🚀", pizza="🍕",
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What is asked for -> (phrases that ask, answer).
LISTS = {
    "days": (["the days of the week", "all days of the week", "the seven days"], ", ".join(DAYS) + "."),
    "months": (["the months of the year", "all months", "the twelve months"], ", ".join(MONTHS) + "."),
    "planets": (["the planets", "the planets of the solar system", "the eight planets"], ", ".join(PLANETS) + "."),
    "seasons": (["the seasons", "the four seasons"], "Spring, summer, autumn, winter."),
    "rainbow": (
        ["the colours of the rainbow", "the colors of the rainbow"],
        "Red, orange, yellow, green, blue, indigo, violet.",
    ),
    "vowels": (["the vowels", "all vowels"], "A, E, I, O, U."),
    "alphabet": (["the letters of the alphabet", "all letters", "the alphabet"], " ".join(LETTERS) + "."),
    "fruits": (["five fruits", "some fruits"], "Apple, banana, cherry, grape, lemon."),
    "oceans": (["the oceans", "the five oceans"], "Pacific, Atlantic, Indian, Southern, Arctic."),
    "continents": (
        ["the continents", "the seven continents"],
        "Africa, Antarctica, Asia, Europe, North America, Oceania, South America.",
    ),
    "primes": (["the first ten primes", "ten prime numbers"], "2, 3, 5, 7, 11, 13, 17, 19, 23, 29."),
    "primary": (["the primary colours", "the primary colors"], "Red, yellow, blue."),
}

STORY = (
    "Once upon a time a small robot lived on a green hill. Every morning it counted the stars that were "
    "still in the sky. One day it counted one star too many. The last star was a lamp in a far window. The "
    "robot walked all day and found a friend there. Since then they count the stars together. The end."
)
POEM = (
    "The moon is up, the lake is still,\nA fox runs home across the hill.\n"
    "The stars look down, the night is deep,\nAnd all the little houses sleep."
)
JOKE = "Why did the computer go to the doctor? It had a virus."

# (what people write, what is answered).
CHAT = [
    (["Hello", "Hello!", "Hello there!", "Hello, how is it going"], "Hello! How can I help you?"),
    (["Hi", "Hi!", "Hi there!", "Hey!"], "Hi! What can I do for you?"),
    (["Good morning", "Good morning!"], "Good morning! How can I help you?"),
    (["Good evening", "Good evening!"], "Good evening! How can I help you?"),
    (
        ["Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Introduce yourself."],
        "I am Exo Tiny, a small language model.",
    ),
    (["Who made you?", "Where do you come from?"], "I was trained from scratch for the Exo project."),
    (["Are you a human?", "Are you a person?"], "No, I am a small language model."),
    (["How are you?", "How do you do?", "How are you today?"], "I am fine, thank you. How are you?"),
    (["Thank you", "Thank you!", "Thanks!", "Thanks a lot!"], "You are welcome!"),
    (["Goodbye", "Goodbye!", "Bye!", "See you later!"], "Goodbye! See you soon."),
    (
        ["What can you do?", "How can you help me?", "Help"],
        "I can count, add, spell, list things, answer small questions, call tools and write JSON.",
    ),
    (["Tell me a story.", "Tell me a short story.", "Write a story."], STORY),
    (["Write a poem.", "Tell me a poem.", "Write a short poem about the night."], POEM),
    (["Tell me a joke.", "Say something funny."], JOKE),
    (["Say yes.", "Just say yes."], "Yes."),
    (["Say no.", "Just say no."], "No."),
    (["Ping", "ping"], "Pong."),
    (["Test", "This is a test."], "The test works."),
    (["What is exo?", "What is the Exo project?"], "Exo runs one language model on several computers."),
]

NAMES = (
    "Ada Alan Alice Anna Ben Boris Carl Carla Clara Claude Dan Diana Edgar Elena Emma Erik Eva Felix Fiona Frank "
    "Fred George Grace Greta Hannah Harry Helen Henry Hugo Ida Igor Irene Ivan Jack Jane Jim John Julia Karl "
    "Kate Laura Leo Linda Lisa Louis Lucy Maria Mark Mary Max Mia Mike Mona Nina Noah Nora Olga Oliver Oscar "
    "Otto Paul Peter Petra Rita Robert Rosa Ruth Sam Sara Sofia Stella Tara Theo Tim Tom Vera Victor Walter Zoe"
).split()
UNSEEN_NAMES = "Marta Nadia Oskar Ramon Selma Simon Tilda Wanda Yara Bruno Darla Milo".split()

CITIES = (
    "Paris Rome Madrid Berlin Lisbon Athens Vienna Warsaw Oslo Stockholm Helsinki Dublin Brussels Tokyo Beijing "
    "Bangkok Cairo Nairobi Lima Havana Ottawa Canberra Moscow Sofia Riga Jakarta London Chicago Boston Dallas "
    "Seattle Denver Miami Toronto Sydney Munich Hamburg Lyon Milan Naples Seville Porto Basel Geneva Bergen "
    "Krakow Mumbai Delhi Osaka Kyoto Seoul Manila Lagos Dakar Bristol Oxford Leeds Dover"
).split()
UNSEEN_CITIES = "Turin Malmo Ghent Perth Tampa Salem Verona Leiden Bremen Durban".split()

WORDS = (
    "apple arrow basket beach bird boat book bottle box branch bread brick brother bucket button cable camera "
    "candle carpet castle chair cheese church circle clock cloud coat coin corner cotton cousin cream cup curtain "
    "desert desk dinner doctor dollar door dragon dream dress driver drum eagle engine farm farmer feather fence "
    "finger fish flag floor flower forest fork friend fruit garden gate ghost giant glass glove grape guitar "
    "hammer hand hat heart helmet hill honey hotel house ice iron island jacket jewel jungle kettle key king "
    "kitchen kite knife ladder lake lamp leaf lemon letter library light lock lunch magnet map market mask "
    "medal metal mirror money monkey moon morning mother motor mountain music nail needle nest noise north note "
    "ocean office onion orange oven owner page paint palace paper parrot pencil pepper piano picture pillow pilot "
    "plane plant plate pocket poem potato prince pupil puzzle queen rabbit radio rain river road rocket roof "
    "room rose salad sand school season shadow ship shirt shoe silver sister smoke soap soldier song soup spoon "
    "square stamp star station stone story street student sugar summer sun table tailor tea teacher temple tent "
    "thunder ticket tiger toast tomato tooth tower train tree trumpet tunnel turtle uncle valley village violin "
    "voice wagon wall watch water whale wheel wind window winter wire wolf wonder wood world yellow zebra"
).split()
UNSEEN_WORDS = (
    "pebble silk marble comet walnut saddle pirate lantern barrel ribbon velvet meadow harbor cactus falcon "
    "orchard blanket canyon goblin pumpkin timber tulip"
).split()

ITEMS = "apples books coins stamps pens keys boxes shoes hats eggs".split()
CONDITIONS = "sunny cloudy rainy windy snowy foggy".split()
