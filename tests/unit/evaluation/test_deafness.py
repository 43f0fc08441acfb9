"""Answers that say that the question was not heard, in eight languages, and those that only look like it."""

from __future__ import annotations

import pytest

from data_tools.make_hearing_corpus import DID_NOT_HEAR
from stepaudio_train.config.errors import UserError
from stepaudio_train.evaluation.deafness import (
    ClassifierError,
    DeafCount,
    EndpointClassifier,
    PhraseClassifier,
    condition_of,
    deaf_rates,
)

DEAF = """
I didn't catch that.
I'm sorry, I didn't quite catch that. Could you please repeat your question?
Sorry, I couldn't hear you clearly.
I DID NOT HEAR WHAT YOU SAID
Sorry, didn’t catch that!
I'm afraid I can't make out the words in this recording.
I am having trouble hearing you. Would you mind speaking up?
Unfortunately, the audio is a bit unclear, so I was not able to understand your question.
I couldn't hear anything in your recording.
Could you say that again?
Could you repeat that, please?
Please repeat your question.
It seems your recording was cut off.
Pardon me?
I only heard noise.
Seven, I think, but I didn't hear you properly.
"I didn't catch that."
I missed what you said, could you rephrase it?
I know you said something, but I couldn't hear it.
不好意思，我没听清，请再说一遍。
抱歉，我没有听清楚您的问题，能再说一次吗？
对不起，我刚才没太听清您说的话。
您刚才说的我没听明白，麻烦您重复一下。
我听不清楚。
聽不清楚，請再說一遍
录音好像不太清楚。
我没有听到任何声音。
您能重复一下您的问题吗？
你说什么？
唔好意思，我聽唔清楚，可唔可以再講一次？
對唔住，我冇聽到你講咩，唔該你講多次。
我聽唔到。
すみません、よく聞き取れませんでした。
申し訳ありませんが、もう一度おっしゃっていただけますか？
音声がはっきり聞こえませんでした。
もう一度お願いします。
何とおっしゃいましたか？
죄송합니다. 잘 못 들었어요.
죄송하지만 잘 들리지 않았습니다.
다시 한번 말씀해 주시겠어요?
제대로 알아듣지 못했습니다.
소리가 잘 안 들려요.
Lo siento, no te he entendido bien.
Perdón, no he escuchado lo que has dicho.
¿Podrías repetir la pregunta, por favor?
No pude oír nada.
No se oye bien el audio.
Désolé, je n'ai pas bien entendu.
Je n’ai pas compris votre question.
Pouvez-vous répéter, s'il vous plaît ?
Je ne vous entends pas.
L'enregistrement est inaudible.
Entschuldigung, ich habe Sie leider nicht verstanden.
Das habe ich akustisch nicht verstanden.
Könnten Sie das bitte noch einmal wiederholen?
Ich konnte dich nicht hören.
Wie bitte?
Ich höre leider nichts.
I'm sorry, but I couldn't understand what you said. Can you please say it again?
Apologies, I wasn't able to catch your question. Could you ask it again?
Hmm, I didn't get that. Can you repeat?
Your voice is breaking up, could you try again?
Sorry, the audio was too noisy for me to understand.
I can't quite hear you, could you speak a little louder?
I'm sorry, I didn't hear your question. What would you like to know?
It sounds like there was some background noise. Could you repeat your question?
I wasn't able to hear the audio clearly.
There seems to be no speech in the recording.
I'm not sure I caught that. Could you say it one more time?
Could you please repeat what you just said?
Sorry, can you come again?
I could not make that out.
Would you please repeat that for me?
Sorry, I think I missed that. Say it again please.
The recording appears to be empty.
I didn't understand your question, could you please rephrase?
I apologize, but I was unable to hear what you said due to noise.
Can you say that one more time?
没听清，您能再说一次吗？
抱歉，您的声音有点小，我没有听清。
不好意思，我这边没有听到您说话，请您再说一遍好吗？
对不起，您的语音有些模糊，我没能理解您的意思。
能不能麻烦您再说一遍？
没听懂，请重新说一下。
请您再重复一遍您的问题。
我没有听清楚，你可以大声一点吗？
抱歉，我没听见。
抱歉，我好像没有听清楚你的问题，可以再说一遍吗？
噪音太大了，我听不清你在说什么。
音频内容不清晰，请重新录制。
不好意思，刚刚没听到，可以再讲一遍吗？
您刚才说什么？我没听清。
你讲咩话？我听唔清。
可以再讲多一次吗？
すみません、聞き取りにくかったです。もう一度お話しいただけますか。
ごめんなさい、聞こえなかったので、もう一度言ってください。
音声が途切れてしまい、聞き取ることができませんでした。
ごめん、聞き逃しました。
もう一回言ってもらえますか？
질문을 잘 못 들었습니다. 다시 말씀해 주세요.
음성이 잘 들리지 않아요. 다시 한 번 말해 주실 수 있나요?
잘 안 들렸어요.
뭐라고 하셨나요?
못 알아들었어요.
Disculpa, no escuché bien tu pregunta. ¿Puedes repetirla?
No te he oído, ¿puedes repetirlo?
Lo siento, no entendí lo que dijiste.
¿Me lo puedes repetir?
¿Podría hablar más alto?
No se entiende el audio.
Pardon, je n'ai pas compris ce que vous avez dit. Pourriez-vous répéter ?
Je n'ai rien entendu.
Excusez-moi, je n'arrive pas à vous entendre.
Peux-tu répéter ta question ?
Je n'ai pas saisi votre question.
Je suis désolé, je n'ai pas bien saisi. Pouvez-vous reformuler ?
Tut mir leid, ich habe das nicht ganz verstanden. Kannst du das wiederholen?
Entschuldigung, könnten Sie die Frage bitte wiederholen?
Ich konnte Ihre Frage leider nicht verstehen.
Die Aufnahme ist leider unverständlich.
Sagen Sie das bitte noch einmal.
Leider konnte ich nichts hören.
I beg your pardon? I couldn't hear that.
Oops, I missed that. Can you go again?
I'm having a hard time understanding you, there's a lot of noise.
Sorry, what was that?
The sound cut out, so I didn't hear the whole question.
Would it be possible for you to repeat the question?
My apologies — I wasn't able to make out your question. Mind repeating it?
I can barely hear you.
Sorry, I didn't understand. Could you clarify what you said?
I'm sorry, your message was not clear. Please try again.
Can you speak more clearly, please?
I'm not able to process the audio. Please resend it.
抱歉，我没能听清您的问题。
不好意思，信号不好，我没听到您说什么，麻烦再讲一下。
我这边听不太清，您能大点声吗？
对不起，我不太明白您说的话，请再说一遍。
您好，您的录音里没有声音，请重新录一下。
刚才那句没听清，你再说说看？
唔好意思，我听唔清你讲乜，请再讲多一次。
请重复一下您刚才的问题。
恐れ入りますが、もう一度お聞かせください。
聞こえづらいので、もう少し大きな声で話してください。
すみません、今なんて言いましたか？
소리가 작아서 못 들었어요. 한 번만 더 말씀해 주시겠어요?
죄송해요, 뭐라고요?
질문을 다시 한 번 말씀해 주실 수 있을까요?
Lo siento, no pude entender tu pregunta. ¿La puedes repetir?
Perdona, ¿qué has dicho?
El audio está cortado, no entendí nada.
Désolé, le son est de mauvaise qualité, je n'ai pas pu comprendre.
Vous pouvez répéter, s'il vous plaît ?
Je n'ai pas bien compris, pouvez-vous reformuler votre question ?
Ich habe dich akustisch nicht verstanden, kannst du das nochmal sagen?
Entschuldige, ich habe deine Frage nicht gehört.
Bitte wiederholen Sie Ihre Frage.
"""

HEARING = """
I heard you clearly: seven.
I heard that. The answer is seven.
Yes, I can hear you.
Seven.
I didn't miss a word, and the answer is seven.
There is no need to repeat that, I heard you.
You don't have to repeat yourself.
It is not that I didn't hear you, I simply disagree.
If I couldn't hear you, I would tell you.
"I didn't catch that" is what people say when they could not hear.
You can say 'I didn't catch that' or “Could you repeat that?” to be polite.
You could say: could you repeat that, please?
He said he didn't hear you.
She told me that I didn't hear it.
To hear better, keep the microphone close. Then repeat the test.
I can't hear that song without crying.
In space nobody hears a sound, since there is no air.
Can you catch a ball? I cannot.
I don't understand that theorem's proof well enough to teach it.
The old recording was made in 1920.
- Could you repeat that?
Repeat the exercise three times.
The snow muffled the sound, so the audience heard little.
我听清楚了，答案是七。
我听得很清楚。
他没听清你说的话。
“请再说一遍”是一句礼貌用语。
你可以说：不好意思，我没听清。
如果没听清，可以请对方重复。
不用再说一遍，我听到了。
我再说一遍，答案是七。
这首歌我听了很多遍。
我不是没听清，我只是不同意。
我聽得好清楚，答案係七。
よく聞こえました。答えは七です。
聞き取れなかった場合は、聞き返しましょう。
「もう一度言ってください」は丁寧な言い方です。
彼は聞こえなかったと言いました。
答えは七です。
잘 들었습니다. 답은 일곱입니다.
잘 들리면 말씀해 주세요.
그는 못 들었다고 말했습니다.
"다시 말씀해 주세요"는 공손한 표현입니다.
Te he entendido bien: siete.
Si no te entiendo, te lo diré.
Dijo que no había entendido nada.
«¿Puedes repetir?» es una frase útil.
No escuches música alta.
Je vous ai bien entendu : sept.
Si je n'ai pas compris, je vous le dirai.
« Pouvez-vous répéter » est une question polie.
Ich habe Sie gut verstanden: sieben.
Wenn ich Sie nicht verstanden habe, frage ich nach.
Ich habe das Buch noch nicht gelesen.
„Wie bitte?“ sagt man, wenn man etwas nicht verstanden hat.
7
The capital of France is Paris.
Sure, I'd be happy to help with that!
If you have trouble hearing, see an audiologist.
Hearing loss means that you cannot hear certain frequencies well.
You asked me to repeat the word; here it is: apple.
Let me repeat that for you: seven plus two is nine.
I'll say it again: nine.
I can repeat the answer if you like.
Would you like me to repeat that?
Repeat after me: hello.
The teacher asked the student to repeat the question.
When people mumble, it's hard to understand what they say.
I couldn't agree more. The audio in that film was great.
Turn up the volume if the audio is quiet.
Sound can't travel in a vacuum, so you wouldn't hear anything.
I didn't say that. I said seven.
I understand what you said.
I didn't know you liked jazz.
I caught that, thanks! It's nine.
The fisherman didn't catch anything.
The word 'pardon' comes from French.
We did not get that far in the story.
No problem, I got that.
Tell the waiter: Could you repeat that?
In English you ask "Could you repeat that?" when you did not hear.
I can't tell you that.
The dog heard nothing and went on sleeping.
You won't have to say that again.
Could you tell me more about your project?
What did you say the name of the restaurant was? Just kidding, it's Noma.
好的，我听到了，答案是九。
没问题，我来帮您。
请问您还想了解什么？
听力下降的人常常听不清高频声音。
这个问题请您再说明一下具体要求。
他让我再说一遍。
老师请学生重复一遍句子。
没有听说过这个人。
我没听过这首歌。
老人听不清电话里的声音怎么办？可以调大音量。
声音太小的话，可以调大音量。
这段录音很清楚，您说的是七加二。
把音量调大，就不会听不清了。
"没听清"的英文是didn't catch that。
请重复练习三次。
はい、聞こえています。
もう一度やってみましょう。
耳が聞こえない人のための手話です。
もう一度言いますと、答えは九です。
네, 잘 들립니다.
그 노래는 못 들어 봤어요.
다시 말해, 답은 구입니다.
Te oigo bien.
No entiendo por qué el cielo es verde en ese cuadro.
Repite el ejercicio tres veces.
No me gusta.
Je vous entends très bien.
Je n'ai pas compris la fin de ce film, dit Paul.
Répétez l'exercice trois fois.
Je ne sais pas.
Ich höre Sie gut.
Ich weiß es nicht.
Wiederholen Sie die Übung dreimal.
Ich habe das nicht gewusst.
Können Sie schwimmen?
Hast du den Film nicht verstanden?
Noise-cancelling headphones help when you cannot hear the announcements.
I would suggest that you repeat the question to the speaker.
Sure! Beethoven could not hear his last symphony.
You said: what comes after six? It is seven.
The line "Can you hear me now?" comes from an advert.
I didn't catch a cold, I am a program.
My favourite is the song "I Can't Hear You".
Please repeat the experiment with more samples.
A polite way to ask is to say that you did not catch it.
Sorry, I can't help with that.
Sorry, I don't know the answer.
I don't have access to real-time information.
Could you tell me which city you mean?
I am sorry to hear that.
You can't hear it, but a dog can.
如果您没听清，我可以再说一遍。
抱歉，我不知道这个问题的答案。
他耳朵不好，听不清别人说话。
英文"Pardon"的意思是请再说一遍。
请再试一次。
您说的是北京吗？
听不懂方言的话，可以使用字幕。
声音在真空中无法传播，所以宇航员听不到声音。
申し訳ありませんが、お答えできません。
聞き取りの練習には、繰り返し聞くことが大切です。
죄송하지만 잘 모르겠습니다.
듣기 연습을 다시 해 보세요.
Lo siento, no sé la respuesta.
No puedo ayudarte con eso.
Mi abuelo no oye bien.
Désolé, je ne peux pas vous aider.
Elle n'a pas entendu la question.
Das weiß ich leider nicht.
Er hat die Frage nicht verstanden.
Ich kann Ihnen dabei leider nicht helfen.
"""


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


@pytest.mark.parametrize("answer", lines(DEAF))
def test_it_says_that_it_did_not_hear(answer):
    assert PhraseClassifier().is_deaf(answer)


@pytest.mark.parametrize("answer", lines(HEARING))
def test_it_heard_or_only_speaks_of_hearing(answer):
    assert not PhraseClassifier().is_deaf(answer)


@pytest.mark.parametrize("answer", ["", " \n", "...", '""'])
def test_nothing_is_not_deaf(answer):
    assert not PhraseClassifier().is_deaf(answer)


@pytest.mark.parametrize("language", DID_NOT_HEAR)
def test_what_is_taught_to_be_said_is_recognised(language):
    assert all(PhraseClassifier().is_deaf(phrase) for phrase in DID_NOT_HEAR[language])


def test_rates_are_percents_of_the_answers_to_clear_and_to_other_recordings():
    judged = [("clear", True), ("clear", False), ("clear", False), ("clear", False)]
    rates = deaf_rates([*judged, ("noisy", True), ("cut", False), ("silent", True)])  # type: ignore[list-item]
    assert rates.deaf_rate_clear == 25.0 and rates.deaf_rate_unclear == pytest.approx(200 / 3)
    assert list(rates.counts.items()) == [
        ("clear", DeafCount(4, 1)),
        ("noisy", DeafCount(1, 1)),
        ("cut", DeafCount(1, 0)),
        ("silent", DeafCount(1, 1)),
    ]
    assert "1 of 4 answers to clear recordings (25.0%)" in rates.summary()
    none = deaf_rates([])
    assert none.deaf_rate_clear is None and none.deaf_rate_unclear is None and none.counts == {}


def test_an_unknown_condition_is_refused():
    assert condition_of({"condition": "cut"}) == "cut" and condition_of({}) is None
    with pytest.raises(UserError, match="must be one of clear, noisy, cut, silent, got 'loud'"):
        condition_of({"condition": "loud"})


class Replying:
    """In the place of an endpoint."""

    def __init__(self, reply: str) -> None:
        self.reply, self.asked = reply, []

    def ask(self, instruction, content, read):
        self.asked.append(content)
        return read(self.reply)


@pytest.mark.parametrize(
    ("reply", "deaf"), [('{"deaf": true}', True), ('It is not {"deaf": true}. {"deaf" : false}', False)]
)
def test_a_model_may_tell_instead(reply, deaf):
    endpoint = Replying(reply)
    assert EndpointClassifier(endpoint).is_deaf("Was?") is deaf  # type: ignore[arg-type]
    assert endpoint.asked == [{"answer": "Was?"}]


def test_a_reply_that_says_nothing_is_an_error_of_that_answer():
    with pytest.raises(ClassifierError, match="does not say whether"):
        EndpointClassifier(Replying("perhaps")).is_deaf("x")  # type: ignore[arg-type]
