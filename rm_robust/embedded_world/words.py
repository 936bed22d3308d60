"""The embedded world's whole vocabulary: few, common words, so that a byte-level BPE of about 1000 entries makes most of them one token."""

NAMES = ("Anna", "Ben", "Eva", "Jack", "Leo", "Lily", "Max", "Mia", "Nina", "Rosa", "Sam", "Tom")

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
"""NUMBERS[n] is the word for n."""

KINDS = {
    "animals": ("cat", "dog", "horse", "cow", "pig", "goat", "lion", "bear", "wolf", "mouse"),
    "colors": ("red", "blue", "green", "black", "white", "brown", "pink", "gray", "yellow", "purple"),
    "fruits": ("apple", "pear", "plum", "lemon", "melon", "peach", "grape", "banana", "cherry", "mango"),
    "foods": ("bread", "rice", "soup", "cheese", "meat", "cake", "butter", "honey", "salt", "sugar"),
    "clothes": ("hat", "coat", "shirt", "sock", "belt", "boot", "shoe", "dress", "scarf", "glove"),
    "tools": ("hammer", "knife", "saw", "rope", "nail", "spoon", "fork", "brush", "ladder", "drill"),
    "places": ("house", "park", "farm", "school", "shop", "bank", "beach", "bridge", "garden", "church"),
}
"""Every noun of the world by its kind, ten of each."""

ADJECTIVES = (
    *("small", "big", "round", "new", "warm", "cold", "soft", "hard"),
    *("clean", "dirty", "happy", "sad", "fast", "slow", "heavy", "light"),
)

THINGS = (
    *("cat", "dog", "horse", "cow", "pig", "goat", "lion", "bear", "pear", "plum"),
    *("lemon", "melon", "hat", "coat", "shirt", "sock", "belt", "boot", "spoon", "fork"),
)
"""Nouns one can own, repeat and describe: all begin with a consonant ("a cat") and take a plain plural."""

COUNTED_THINGS = ("cats", "dogs", "pears", "plums", "lemons", "hats", "coats", "socks", "boots", "forks")

ALPHABET_WORDS = (
    *("apple", "bear", "cat", "dog", "fork", "goat", "hat", "knife"),
    *("lemon", "mouse", "nail", "pig", "rope", "sock", "wolf", "yellow"),
)
"""Sixteen nouns with sixteen first letters, in alphabetical order."""

NOUNS = tuple(noun for nouns in KINDS.values() for noun in nouns)

CONTENT_WORDS = frozenset(word.lower() for word in (*NOUNS, *ADJECTIVES, *NAMES))
"""Lower-case words that make a claim when a completion uses them; number words claim only where a number was asked for."""

FUNCTION_WORDS = frozenset(
    ("a", "an", "the", "and", "is", "are", "has", "have", "it", "there", "here", "now", "in", "order", "words", "with", *KINDS)
)
"""Lower-case words that hold an answer together. They claim nothing and, in moderation, are no filler."""

SINGULAR = {noun + "s": noun for noun in NOUNS}
