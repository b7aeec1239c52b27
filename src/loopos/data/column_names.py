"""The names that columns of labelled data sets usually carry, in lower case with underscores.

Enters: nothing. Leaves: tables for `formats.detect`: a role's names in tiers, a better tier winning over a later one,
and the pairs of names that belong together. Left out: the matching itself.
"""

from __future__ import annotations

TEXT_TIERS: tuple[frozenset[str], ...] = (
    frozenset({"text"}),
    frozenset({
        "sentence", "content", "review", "message", "comment", "document", "body", "utterance", "tweet", "post",
        "passage", "abstract", "description", "sms", "email", "texts", "sentences", "review_text", "review_body",
        "review_content", "reviewtext", "comment_text", "message_text", "tweet_text", "full_text", "question_text",
        "text_a", "text1", "sentence1", "input_text", "article", "statement", "claim", "dialogue", "transcript",
        "transcription", "feedback", "complaint", "news",
    }),
    frozenset({"question", "query", "input", "title", "headline", "subject", "prompt", "premise", "problem"}),
)  # fmt: skip

PAIRS: tuple[tuple[str, str], ...] = (
    ("text", "text_pair"), ("text", "text2"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"),
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("sent1", "sent2"),
    ("s1", "s2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "answer"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"), ("query", "document"),
    ("query", "passage"), ("query", "text"), ("claim", "evidence"),
)  # fmt: skip

LABEL_TIERS: tuple[frozenset[str], ...] = (
    frozenset({"label", "labels"}),
    frozenset({
        "target", "targets", "class", "classes", "category", "categories", "intent", "intents", "sentiment", "rating",
        "ratings", "score", "scores", "stars", "star", "star_rating", "emotion", "emotions", "topic", "topics", "y",
        "gold", "gold_label", "polarity", "toxicity", "tag", "tags", "genre", "fine_label", "coarse_label", "label_id",
        "label_idx", "label_text", "label_name", "similarity", "similarity_score", "relatedness_score",
        "airline_sentiment", "grade", "value", "outcome", "is_duplicate", "entailment", "spam", "toxic",
    }),
)  # fmt: skip
