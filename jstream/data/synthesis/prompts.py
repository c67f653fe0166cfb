"""All that a model is asked, and all that users are made to say. What these are for is told where they are used."""

from jstream.data.synthesis.asking import Prompt

# ----------------------------------------------------------------------------------------------- chats, live_chats.py

REWRITE = Prompt(
    task=(
        "You edit notes on a video that somebody wears a camera in. The notes may use codes for people, tags, "
        "abbreviations and broken grammar. Rewrite every note as one plain, short sentence in the present tense that "
        'speaks to the wearer of the camera as "you". Other people are "someone" unless a note says who they are. Add '
        "nothing, leave nothing out, keep the order, and give exactly one line for every note."
    ),
    given="{number} notes:\n{lines}",
    form={"lines": [str]},
)

CHAT_ANSWER = Prompt(
    task=(
        "You are the voice of an assistant that watches through a user's camera and helps while things happen. You get "
        "notes on all that has happened up to this moment, oldest first, and a question the user has asked. Answer as "
        "of this moment, speaking to the user, in one short sentence or two. Rely on the notes for what has happened; "
        "for what comes next, say what is likely after it. If the notes do not touch the question, say so helpfully. "
        "You have no clock: never mention times, durations or the notes themselves."
    ),
    given="Up to now:\n{notes}\n\nThe user's question: {query}",
    form={"answer": str},
)
NOTHING_YET = "(nothing worth a note)"
STILL_GOING_ON = " (still going on)"

PAST = (
    "What did I just do?",
    "What have I done so far?",
    "Remind me of the step before this one.",
    "Can you sum up what I did up to here?",
    "Which things have I used until now?",
    "Did I leave anything unfinished?",
)
PRESENT = (
    "What am I doing right now?",
    "Tell me what is going on, and keep me posted.",
    "Describe what I do as I do it.",
    "What am I working with at the moment?",
    "Which step am I at?",
    "Comment on my progress as I go.",
)
FUTURE = (
    "What should I do next?",
    "What is likely to happen now?",
    "Guide me to the next step each time I finish one.",
    "What will I need soon?",
    "How do I go on from here?",
    "What is still left to do?",
)
CORRECTIONS = ("Sorry, that was wrong. {}", "Let me correct myself: {}", "I misspoke. {}")

# ----------------------------------------------------------------------------------- Streamo's tasks, streamo_tasks.py

PAIR = Prompt(
    task=(
        "You see two pictures of a video, one second apart. Say in one short sentence what happens between them: who "
        "or what moves, acts, comes, goes or changes. Tell only what can be seen. If nothing that matters has changed, "
        "give an empty text."
    ),
    given="What happens from the first picture to the second?",
    form={"change": str},
)
CLEAN = Prompt(
    task=(
        "You edit the raw narration of a video: one line for each moment at which something was thought to happen, in "
        "order of time. Give one line back for each of them. Make it a plain, fluent sentence that names people and "
        "things the same way throughout. Reject a line by giving an empty text for it: when it only repeats what the "
        "lines before have told, is vague, guesses, contradicts its neighbours, or speaks of pictures, frames or "
        "cameras and not of what happens."
    ),
    given="{number} lines:\n{lines}",
    form={"lines": [str]},
)
EVENT_CAPTION = Prompt(
    task=(
        "You see pictures from one event of a video, in order. Write a caption for the event as a whole: one sentence "
        "that says who does what to what, precise enough to find this event again in the video. A note on the event is "
        "given as a hint; trust the pictures where the two differ."
    ),
    given="The hint: {hint}",
    form={"caption": str},
)
ACTION_CAPTION = Prompt(
    task=(
        "You see pictures from one stretch of a video, in order. Name the action performed in it, as a step of an "
        "instruction would: a verb and its objects, at most ten words, no subject. A note on the action is given as a "
        "hint; trust the pictures where the two differ."
    ),
    given="The hint: {hint}",
    form={"caption": str},
)
GROUND = Prompt(
    task=(
        "You see pictures of a video in order, each behind the second it was taken at. Find the one stretch that a "
        "description fits: the second at which it begins and the second at which it is over. If the description fits "
        "no stretch, or several that are apart, it is not found; then give 0 for both."
    ),
    given="The description: {caption}",
    form={"found": bool, "start": float, "end": float},
)
AS_QUERY = Prompt(
    task=(
        "A video has several events, each with a caption. Turn the caption of one of them into what a viewer would ask "
        "an assistant in order to be told when that event takes place. Use words of your own, keep what tells the "
        "event from the others, and say nothing of its time. Say also whether the query fits that event alone."
    ),
    given="All captions:\n{lines}\n\nThe event asked for is number {number}. {asked}",
    form={"query": str, "fits_only_this": bool},
)
FORWARD = "It has not happened yet: ask to be told when it does."
BACKWARD = "It is over: ask when it did happen."
GROUNDED = "From {:.12g}s to {:.12g}s."

CHANGING_QUESTION = Prompt(
    task=(
        "You get what happens in a video as a numbered list, in order of time. Write one question about the state of "
        "things that a viewer could ask early on and whose right answer changes more than once as the video goes on, "
        "such as how many, where, which, or how far. Then give the right answer as of the end of each item, knowing "
        "only that item and those before it: as many answers as items. Repeat an answer word for word as long as it "
        "stays the same, keep answers to a few words, and give an empty text while no answer can be known."
    ),
    given="{number} items:\n{lines}",
    form={"question": str, "answers": [str]},
)

NARRATE = (
    "Narrate what happens as it happens.",
    "Tell me whenever something happens.",
    "Keep me up to date on what you see.",
    "Give me a running commentary.",
)
CAPTION_EVENTS = (
    "Describe each event once it is over.",
    "Give every event a caption when it ends.",
    "Whenever an event ends, sum it up in a sentence.",
)
CAPTION_ACTIONS = (
    "Name every action once it is done.",
    "List the steps as they are completed.",
    "After each step, tell me what it was.",
)
