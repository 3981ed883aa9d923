"""Questions about paged attention, this project and the model itself, small talk, and a polite way out of the rest.

Every topic has names that fit the general wordings ("What is {}?") and a few wordings of its own. About one wording in
six is held out of training, chosen by a fixed rule, so that `--evaluate` asks in words the model has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

GENERAL = (
    "What is {}?", "What is {} in jaxpaged?", "Explain {}.", "Can you explain {}?", "Tell me about {}.",
    "What does {} mean?", "Please explain {}.", "What do you know about {}?", "Define {}.", "Describe {}.",
    "What's {}?", "I want to know what {} is.", "{}?", "Please tell me what {} is.", "How would you explain {}?",
    "What is meant by {}?",
)  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """An answer, the names under which it is asked for, and wordings that fit only this topic."""

    answer: str
    names: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()

    def wordings(self) -> list[str]:
        """All wordings of the question."""
        return [g.format(n) for g in GENERAL for n in self.names] + list(self.asks)


TOPICS = (
    Topic(
        "Paged attention keeps the keys and values of a sequence in small pages. "
        "A block table says where each page is, so memory is used well.",
        ("paged attention", "PagedAttention"),
        ("How does paged attention work?", "What is the idea of paged attention?", "Why do we use paged attention?",
         "What does paged attention do?", "What is paged attention good for?", "Why paged attention?"),
    ),
    Topic(
        "A page is a small block of memory that holds the keys and values of a few tokens, for example sixteen.",
        ("a page", "a KV page", "a block"),
        ("What is in a page?", "What does a page hold?", "What is a page made of?", "How big is a page?"),
    ),
    Topic(
        "A block table lists the pages of one sequence in order. Attention reads it to find the keys and values.",
        ("a block table", "the block table", "a page table"),
        ("What does the block table do?", "Why do we need a block table?", "What is in the block table?",
         "How does attention find its pages?"),
    ),
    Topic(
        "The page pool is the memory that holds all pages. Free pages wait there until a sequence needs them.",
        ("the page pool", "a page pool"),
        ("Where do pages come from?", "Where are the free pages?", "Where do free pages wait?", "What does the page pool do?"),
    ),
    Topic(
        "Copy on write means that two sequences share a page until one of them writes. Then the writer gets its own copy.",
        ("copy on write", "copy-on-write"),
        ("When is a page copied?", "What happens when a shared page is written?", "Who may write to a shared page?",
         "Why is a page copied?"),
    ),
    Topic(
        "The prefix cache keeps full pages of earlier prompts. A new prompt with the same start reuses them and saves work.",
        ("the prefix cache", "prefix caching", "a prefix cache"),
        ("How are prompts shared?", "Why is the same prompt faster the second time?", "What does the prefix cache do?",
         "How does prefix caching work?"),
    ),
    Topic(
        "Continuous batching lets new requests join the batch at every step, and finished ones leave at once.",
        ("continuous batching", "a continuous batch"),
        ("How does continuous batching work?", "When do new requests join the batch?", "Why continuous batching?",
         "How are requests batched?"),
    ),
    Topic(
        "Preemption means that the engine takes the pages of a running request when memory is full. The request starts again later.",
        ("preemption", "a preempted request"),
        ("What happens when the pages run out?", "What happens when memory is full?", "When is a request preempted?",
         "What if there are no free pages?"),
    ),
    Topic(
        "A bucket is a fixed shape for a batch. Each batch is padded to the next bucket, so JAX compiles only a few programs.",
        ("a bucket", "bucketing"),
        ("Why are there buckets?", "Why is the batch padded?", "What are buckets for?", "How are shapes chosen?"),
    ),
    Topic(
        "The null page is a page that nobody owns. Padding writes go there, so they can do no harm.",
        ("the null page", "a null page"),
        ("Where does padding go?", "Where do padding writes go?", "What is the null page for?", "Why is there a null page?"),
    ),
    Topic(
        "The scheduler decides at every step which requests run and how many tokens each of them gets.",
        ("the scheduler", "scheduling"),
        ("Who decides which requests run?", "What does the scheduler do?", "How does the scheduler work?",
         "Which part decides what runs next?"),
    ),
    Topic(
        "The KV cache keeps the keys and values of earlier tokens, so they are not computed again for every new token.",
        ("the KV cache", "a KV cache"),
        ("What does the KV cache hold?", "Why is there a KV cache?", "Why do we keep keys and values?",
         "What is the KV cache for?"),
    ),
    Topic(
        "A prefill reads the whole prompt and fills the pages with its keys and values.",
        ("prefill", "a prefill"),
        ("What happens to the prompt first?", "How is the prompt read?", "What does the prefill do?"),
    ),
    Topic(
        "Decoding makes one new token at a time for each running request and adds it to the pages.",
        ("decoding", "a decode step"),
        ("How are new tokens made?", "How many tokens does a step make?", "What happens in a decode step?"),
    ),
    Topic(
        "A token is a small piece of text, often one word. The model reads and writes tokens.",
        ("a token", "tokens"),
        ("What does the model read and write?", "What is a token for?", "Is a token a word?"),
    ),
    Topic(
        "Chunked prefill cuts a long prompt into parts, so other requests do not have to wait for it.",
        ("chunked prefill", "a chunked prefill"),
        ("How are long prompts handled?", "What happens to a long prompt?", "Why is a long prompt cut into parts?"),
    ),
    Topic(
        "Jaxpaged is an inference engine for language models, written in JAX. It serves many requests with paged attention.",
        ("jaxpaged", "this project", "Jaxpaged"),
        ("What is jaxpaged for?", "What does jaxpaged do?", "What can jaxpaged do?", "What is this project about?",
         "What engine is this?", "What software runs you?"),
    ),
    Topic(
        "JAX compiles one program for CPU, GPU and TPU. So the engine is short, and the same code runs on all of them.",
        ("JAX", "the reason for JAX"),
        ("Why JAX?", "Why is it written in JAX?", "Why do you use JAX?", "Why was JAX chosen?",
         "What is good about JAX?", "Why does jaxpaged use JAX?"),
    ),
    Topic(
        "Jaxpaged runs on CPU, on GPU and on TPU, because JAX compiles for all of them.",
        ("the list of devices",),
        ("Which devices can I use?", "Does it run on a GPU?", "Does it run on a TPU?", "Do I need a GPU?",
         "Can I run this on a CPU?", "Which devices does jaxpaged support?", "What devices are supported?",
         "Where does jaxpaged run?", "Does jaxpaged run on a laptop?", "Can it run without a GPU?"),
    ),
    Topic(
        "No. I am a tiny model for demonstration. I can tell short stories and answer questions about them, but I am not smart.",
        (),
        ("Are you smart?", "Is this model smart?", "Are you intelligent?", "Is this model any good?",
         "How smart are you?", "Are you a good model?", "Are you clever?", "Do you know everything?",
         "Are you like a big model?", "Is this a smart model?", "Can I trust you?", "Are you always right?"),
    ),
    Topic(
        "I am the tiny demonstration model of jaxpaged. I know short stories, small drills and paged attention.",
        (),
        ("Who are you?", "What are you?", "What is your name?", "What model is this?", "Which model are you?",
         "Tell me about yourself.", "Introduce yourself.", "What kind of model are you?", "Are you a bot?",
         "What model are you?", "Who am I talking to?", "Are you a person?", "Please introduce yourself."),
    ),
    Topic(
        "I can tell short stories, answer questions about a story, copy, count and sort words, write JSON, and explain paged attention.",
        (),
        ("What can you do?", "Help", "Can you help me?", "What do you know?", "How can you help me?", "What should I ask?",
         "What can I ask you?", "What are you good at?", "How can I use you?", "help me", "What are you able to do?",
         "What should I ask you?"),
    ),
    Topic(
        "I was trained on two processor cores with text that a script wrote. The command is in the README.",
        ("your training data",),
        ("How were you trained?", "Who trained you?", "What were you trained on?", "How was this model made?",
         "Who made you?", "Where do you come from?", "Which data were you trained on?", "How was the model trained?",
         "Who wrote your training text?", "Can I train you myself?"),
    ),
    Topic(
        "I have about two million parameters. That is very small for a language model.",
        ("your size",),
        ("How big are you?", "How many parameters do you have?", "How large is this model?", "How big is this model?",
         "Are you a large model?", "How small are you?", "How many parameters does the model have?"),
    ),
    Topic(
        "Start the server with jaxpaged serve and send requests as you would to any chat server of the usual kind.",
        ("the server",),
        ("How do I start the server?", "How can I use the server?", "How do I start jaxpaged?", "How do I run jaxpaged?",
         "How do I serve a model?", "How do I use jaxpaged?", "Which command starts the server?"),
    ),
    Topic(
        "Temperature sets how random the answer is. Zero always takes the most likely token.",
        ("temperature", "the temperature"),
        ("How do I make the answer less random?", "How do I get the same answer again?", "What does temperature do?"),
    ),
    Topic(
        "Greedy decoding always takes the most likely next token, so the same prompt gives the same answer.",
        ("greedy decoding", "greedy sampling"),
        ("How does greedy decoding work?", "Which token does greedy decoding take?"),
    ),
    Topic(
        "Grouped query attention lets several query heads share one head of keys and values, so the pages are smaller.",
        ("grouped query attention", "GQA"),
        ("Why do query heads share keys?", "How does grouped query attention save memory?"),
    ),
    Topic(
        "Fragmentation is memory that is free but useless because it lies in small holes. Pages of one size avoid it.",
        ("fragmentation", "memory fragmentation"),
        ("Why do pages save memory?", "How do pages avoid holes?", "Why are all pages of one size?"),
    ),
    Topic(
        "A sequence gives its pages back to the pool when its last request is done. Then other sequences can use them.",
        (),
        ("When are pages freed?", "When is a page free again?", "What happens to the pages at the end?",
         "Who frees the pages?", "What happens to the pages of a finished request?", "When do pages go back to the pool?"),
    ),
    Topic(
        "A reference count says how many sequences use a page. The page is free when the count is zero.",
        ("a reference count", "the reference count"),
        ("How does the engine know that a page is free?", "How are shared pages counted?", "Who counts the users of a page?"),
    ),
    Topic(
        "Streaming sends each piece of the answer as soon as it is made, so you do not wait for the end.",
        ("streaming", "a streaming answer"),
        ("Why does the answer come in pieces?", "How does streaming work?", "How do I get the answer piece by piece?"),
    ),
    Topic(
        "Hello! I am a tiny model. Ask me for a story, or ask me about paged attention.",
        (),
        ("Hi", "Hello", "Hey", "Hello!", "Hi!", "Hi there", "Hello there!", "Good morning", "Good evening", "Hey there!",
         "Good day", "Hello, who is there?", "Good afternoon", "hello", "hi", "Greetings", "Hello again", "Hi, model!"),
    ),
    Topic(
        "I am fine, thank you. Do you want to hear a story?",
        (),
        ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?", "Are you fine?",
         "How do you feel?", "What's up?", "Hi, how are you?", "Hello, how are you?"),
    ),
    Topic(
        "You are welcome!",
        (),
        ("Thank you.", "Thanks", "Thanks!", "Thank you very much.", "Thank you!", "Many thanks", "Great, thank you.",
         "Good, thanks.", "Nice, thank you!", "That is great, thanks.", "Well done!", "Very good!"),
    ),
    Topic(
        "Goodbye! Come back for another story.",
        (),
        ("Goodbye", "Bye", "See you later", "Good night", "Bye bye", "See you soon", "Goodbye!", "Bye!", "Farewell"),
    ),
)  # fmt: skip

OFF_TOPIC = "I am sorry, I do not know that. I am a tiny demonstration model and know only short stories, small drills and paged attention."
SUBJECTS = (
    "France", "the moon", "physics", "history", "football", "music", "the president", "money", "love", "China", "cars",
    "the ocean", "Python", "computers", "math", "biology", "politics", "the universe", "food", "pizza", "movies",
    "London", "my cat", "the news", "the law", "medicine", "gravity", "a black hole", "Germany", "art", "the economy",
    "the internet", "quantum physics", "chess", "the weather tomorrow", "bitcoin", "Shakespeare", "evolution", "Paris",
    "the brain", "Linux", "the stock market", "yoga", "coffee", "religion", "a triangle", "Java", "Rust", "Einstein",
)  # fmt: skip
OFF_ASKS = (
    "What is {}?", "Tell me about {}.", "Explain {}.", "Who invented {}?", "What is the capital of {}?",
    "How does {} work?", "What do you think about {}?", "Why is {} so important?", "Write a poem about {}.",
    "Write code for {}.", "How old is {}?", "Who is the president of {}?", "What is the best book about {}?",
    "Translate this into {}.", "When was {} discovered?", "Can you explain {} to me?", "How much does {} cost?",
    "What is the meaning of {}?", "Give me advice about {}.", "Do you like {}?", "How far is {}?",
    "Help me with {}.", "Summarize the history of {}.", "What are the rules of {}?", "How do I learn {}?",
    "What is two plus two?", "What time is it?", "What is the meaning of life?", "Write a function in Python.",
    "What is 5 times 7?", "Solve this equation.", "Book a flight for me.", "Who won the game?", "Why is the sky blue?",
    "What day is it today?", "How is the weather today?", "Translate hello into French.", "Give me a recipe.",
    "Who wrote this book?", "What is the largest country?", "Recommend a movie.", "Fix my code.",
)  # fmt: skip


def is_held_out(wording: str) -> bool:
    """Whether a wording is kept for evaluation: a fixed sixth of them all, by checksum."""
    return crc32(wording.encode()) % 6 == 0


def questions(held_out: bool = False) -> list[tuple[str, str]]:
    """Every trained (or held-out) wording with its answer. A held-out wording keeps its case and its punctuation."""
    trained = {plain(w) for t in TOPICS for w in t.wordings() if not is_held_out(w)}
    rows = [(w, t.answer) for t in TOPICS for w in t.wordings() if is_held_out(w) is held_out]
    return [(w, a) for w, a in rows if not (held_out and plain(w) in trained)]


def plain(text: str) -> str:
    """A wording without case and final punctuation: two wordings equal in this form count as one."""
    return text.lower().rstrip("?.! ")


def off_topic(rng: Random, held_out: bool = False) -> tuple[str, str]:
    """A question outside the model's small world; held-out ones combine wording and subject anew."""
    while True:
        text = rng.choice(OFF_ASKS).format(rng.choice(SUBJECTS))
        if is_held_out(text) is held_out:
            return text, OFF_TOPIC
