"""How it is said, in eight languages, that something was not heard, or is to be said again.

Patterns are for text as `evaluation.deafness` prepares it: lower case, no accents in Latin script, no apostrophes, no
fillers, simplified Chinese characters, pauses as " , " or, in scripts without spaces, ",".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """Of one language."""

    fillers: re.Pattern[str]
    """Taken away first, so that patterns need not provide for them."""
    said: re.Pattern[str]
    not_behind: re.Pattern[str]
    """What stands in front of a phrase takes it back: conditions, reports, negations."""
    not_before: re.Pattern[str]
    """The same of what stands behind it."""
    spaced: bool
    """Whether the language puts spaces between words; otherwise they are taken away, in Korean because habits vary."""


def _phrases(
    fillers: str, said: Sequence[str], not_behind: str = r"(?!)", not_before: str = r"(?!)", spaced: bool = True
) -> Phrases:
    whole = rf"\b(?:{fillers})\b" if spaced else fillers
    return Phrases(
        re.compile(whole), re.compile("|".join(said)), re.compile(not_behind), re.compile(rf"^(?:{not_before})"), spaced
    )


def _english() -> Phrases:
    end = (
        r"(?=$| ,| (?:but|and|so|because|due|since|over|at all|from|there|this time|that time|either|for me"
        r"|to (?:hear|understand))\b| (?:in|on) (?:the|your|this)\b)"
    )
    i = r"(?:\bi|\bwe|\bim|^|, |\bbut|\band)(?: am| was| were)? ?"
    cannot = (
        r"(?:(?:did|do|could|was|were|have)(?:nt| not)|can(?:t|not| not)|(?:can|could) (?:barely|hardly)"
        r"|not able to|unable to|failed to"
        r"|(?:having|had|have)(?: some| a bit of)? (?:trouble|difficulty|problems|a hard time))(?: able to"
        r"| be able to)?"
    )
    thing = (
        r"(?:question|audio|recording|voice|message|words?|speech|sounds?|request|part|sentence|bit|end|beginning"
        r"|rest)"
    )
    asked = (
        rf"(?:you|that|what you(?:re| are| were| have)?(?: \w+)? (?:say|said|saying|ask|asked|asking)"
        rf"|what was (?:said|asked)"
        rf"|(?:your|the|any|a|an|this)(?: \w+){{0,2}} {thing}(?: of (?:that|it|your \w+|the \w+))?)"
    )
    bare = rf"(?:{asked}|it|this|anything|everything|much|all of (?:that|it)|any of (?:that|it))"
    ask = (
        r"(?:(?:can|could|would|will|may) you|would you mind|do you mind|if you (?:can|could|would)|\bmind"
        r"|(?:need|ask|asking|like) you to|(?:would it be|is it) possible(?: for you)? to"
        r"|\bplease|\bkindly|may i ask you to)(?: please| kindly| try to)*"
    )
    more = (
        r"(?: (?:again|for me|once more|one more time|once again|a bit|a little|more|louder|slowly|loudly"
        r"|slower|please))*"
    )
    audio = r"(?:the|your|this)(?: (?:audio|voice|sound))? (?:audio|recording|sound|voice|speech|clip|microphone)"
    seems = (
        r"(?:is|was|seems|seemed|appears|appeared|sounds|sounded|got|gets|came through"
        r"|comes through)(?: to be| to have been)?"
    )
    return _phrases(
        r"really|quite|clearly|properly|actually|fully|just|sorry|unfortunately|very|well|exactly|entirely"
        r"|completely|"
        r"possibly|maybe|perhaps|still|correctly|apologies|currently",
        (
            rf"{i}{cannot} (?:catch|hear|make out|pick up|decipher|caught|heard|hearing|catching"
            rf"|making out) {bare}{end}",
            rf"{i}{cannot} (?:get|follow|understand|understood|understanding) {asked}{end}",
            rf"{i}{cannot} (?:hear|make (?:that|it|this) out){end}",
            rf"{i}(?:didnt|did not) understand$",
            rf"{i}{cannot} process (?:the|your) (?:audio|recording|voice message){end}",
            rf"{i}missed (?:that|what you said|your (?:question|message)|part of (?:that|your \w+)){end}",
            rf"{i}(?:can )?(?:hear|heard) (?:nothing|silence|only silence|noise|only noise|only static"
            rf"|no (?:speech|words|sound|question)){end}",
            rf"{i}(?:could )?only (?:hear|heard|catch|caught|got) (?:noise|static|half|part|a few words"
            rf"|the (?:first|beginning|start))",
            rf"{ask} (?:resend|record|re record) (?:it|that|(?:your|the) (?:audio|recording|message|question)){end}",
            r"\byour message (?:is|was) (?:not clear|unclear)",
            r"\ball i (?:can |could )?heard? (?:is|was)(?: \w+)? (?:noise|static|silence)",
            rf"{ask} (?:repeat|rephrase|restate|repeating|rephrasing)(?: (?:{bare}|yourself))?{more}{end}",
            rf"(?:{ask} |^)say(?:ing)? {bare} (?:again|once more|one more time)\b",
            rf"{ask} (?:speak|talk)(?: up| (?:a (?:bit|little) )?(?:more )?(?:louder|loudly|slower|slowly)"
            rf"| more{end})",
            r"^(?:i beg your )?pardon(?: me)?$|(?:^|you )come again$|^say again$|^what (?:did you say|was that)$",
            rf"\b{audio} {seems}(?: a bit| a little| too| so| mostly)* (?:unclear|inaudible|silent|blank|empty"
            rf"|garbled|muffled"
            rf"|unintelligible|cut off|cut short|incomplete|noisy|quiet|distorted|breaking up){end}",
            rf"\b{audio} (?:is|was)(?:nt| not)(?: \w+)? (?:clear|audible|intelligible|understandable)",
            r"\bthere(?:s| is| was| seems to be) (?:no|too much)(?: \w+)? (?:sound|speech|audio|voice|question"
            r"|noise) "
            r"(?:in|on) (?:the|your|this) (?:audio|recording|clip|message)",
        ),
        r"\b(?:if|when|whenever|unless|because|whether|(?:not|isnt|wasnt) (?:that|because|as if|like)|(?<!to )say"
        r"|saying|"
        r"claim|claimed|pretend|pretending)(?: that| ever)? ?$"
        r"|\byou (?:can|could|should|might|may|would|will)(?: \w+)? (?:say|ask|tell|use|write|reply"
        r"|answer)(?: \S+){0,4} ?$"
        r"|(?<!you )\b(?:said|says|told|tells|replied|asked|wrote|means|meaning|phrases?|expressions?"
        r"|translat\w+)(?: \S+){0,4} ?$"
        r"|\b(?:tell|ask) (?:him|her|them|people|someone|(?:the|your) \w+)(?: \S+){0,3} ?$"
        r"|\b(?:never|not|dont|wont|no need to|need not|neednt)(?: \w+)? ?$",
    )


def _chinese() -> Phrases:
    """Mandarin and Cantonese, which many answers mix."""
    about = (
        r"(?=$|,|楚|您|你|刚|问题|说|讲|这|那|内容|语音|录音|声音|音频|什么|任何|后面|前面|最后|具体|您|嘢|咩"
        r"|了|啊|呢|哦|呀|喎|喔|,|请|能|可)"
    )
    ask = r"(?:请|麻烦|劳烦|烦请|能否|能不能|能|可以|可不可以|可否|唔该|可唔可以|可以唔可以|得唔得|方便)"
    audio = r"(?:声音|语音|录音|音频|麦克风)"
    return _phrases(
        r"太|很|完全|怎么(?=听)|有点儿?|有些|好像|似乎|实在|真的|刚才|刚刚|头先|啱啱|清楚地|慢慢地?|大概|可能",
        (
            rf"(?:没|没有|没能|没法|没办法|未能|无法|不能|难以|冇|未|唔系(?:好|几)|不是)(?:听|听得)(?:清楚?|见|到"
            rf"|懂|明白?|出|全|完整){about}",
            rf"听(?:得)?(?:不|唔)(?:是|系好|系几|大)?(?:清楚?|见|到|懂|明白?|清晰|真|出){about}",
            r"(?:没|没有|没能|未能|无法|唔)(?:理解|明白|听明白|搞懂)(?:您|你)(?:的意思|的问题|说|讲|想)",
            r"(?:没|没有|未|未能|无法)(?:收到|检测到|识别到?|听到)(?:任何|您的?|你的?|有效的?)*(?:声音|语音|内容"
            r"|问题|说话|音频)",
            r"(?<!我)(?<!我[就来要会])(?<!我可以)(?<!跟我)再(?:清楚|大声)*(?:说|讲|问|重复|复述|描述|提问"
            r"|表述)(?:多)?(?:一|1|过)?(?:遍|次)",
            r"讲多(?:一)?(?:次|遍)",
            rf"{ask}(?:您|你|再|我)*(?:重复|重讲|重说|复述)(?:一)?(?:下|遍|次)(?=$|,|吗|么|好吗|您|你|问题|那|吧"
            rf"|呢|的)",
            rf"{ask}(?:您|你)*重新(?:说|讲|提问|问|录制|录|发送|表述)",
            rf"{ask}(?:您|你)*(?:说|讲)(?:得)?(?:大声|清楚|慢|响)(?:一)?(?:点|些|啲)",
            r"(?:^|,)(?:您|你)(?:说|讲)(?:的)?(?:是)?(?:什么|啥|咩)(?:来着|话|啊|呀)?(?=$|,)",
            rf"{audio}(?:不清楚?|不清晰|模糊|不完整|断断续续|中断|被截断|空白|听不清|唔清楚)(?!的)",
            rf"{audio}(?:里|中|的)*(?:背景)?(?:噪音|杂音|噪声)(?:大|多|过大)(?=$|,|了)",
        ),
        r"(?:如果|假如|要是|若|万一|假装|不是|并非|并没有|他|她|它|大家|别人|对方|者|员|人|意思是"
        r"|翻译成|以免|除非|即使)(?:您|你|我|们|就|有|请|麻烦)*$"
        r"|(?:可以|应该|应当|不要|不用|不必|无需|别|他|她|句|会|能)(?:这样|这么|礼貌地|跟对方|对对方)?(?:说|讲|问"
        r"|回答|表示|写)(?::|,)?(?:抱歉|对不起|不好意思|唔好意思)?,?(?:我)?$"
        r"|(?:不用|不必|无需|别|不要|唔使|会|常常?|经常|容易)(?:您|你)?$",
        r"(?:的)?(?:时候|话(?=,)|时,|怎么办|的人|的原因)",
        spaced=False,
    )


def _japanese() -> Phrases:
    again = r"もう(?:一度|いちど|一回|いっかい|1度|1回)"
    hear = r"(?:聞き?|聴き?|きき)(?:取|と)"
    asks = r"(?:ください|下さい|ますか|ませんか|もらえ|いただけ|頂け|くれ|願い|ほしい|でしょうか|ますでしょう)"
    return _phrases(
        r"よく|うまく|はっきりと?|少し|ちょっと|ゆっくりと?|大きな声で|正確に|ちゃんと|全く|まったく",
        (
            rf"{hear}れ(?:ません|なかった|なく|ない|ず|ていません|てない)",
            rf"{hear}(?:ること)(?:が|は)?でき(?:ません|なかった|ず|ない|なく)",
            rf"{hear}り(?:にく|づら|ずら|辛)",
            r"(?:聞|聴|き)こえ(?:ません|なかった|ない|なく|ず|づら|にく|ていません)",
            r"(?:聞き|聴き)(?:逃し|漏らし|そびれ)",
            rf"{again},?[^,]{{0,12}}?(?:言|仰|おっしゃ|話し|聞かせ|願い|繰り返|質问|教え)[^,]{{0,8}}?{asks}",
            rf"{again}(?:言って|話して|お?願い(?:し|いたし)ます)(?:$|,)",
            rf"(?:質问|お話|今の言葉|お言葉)を繰り返して{asks}",
            r"(?:^|,)(?:今)?(?:何|なん)(?:と|て)(?:言い|おっしゃい|仰い)ました(?:か)?",
            r"(?:音声|録音|マイク|お声)(?:が|は)[^,]{0,6}?(?:不明瞭|途切れ|小さ(?:く|すぎ)|入っていません|无音)",
        ),
        r"(?:彼|彼女|彼ら|みんな|相手|人)(?:は|が|に)[^,]*$|(?:もし|たとえ)[^,]*$",
        r"(?:でした|です)?(?:場合|とき|時|なら|ら|れば|人|方|と(?:言|い|答|伝|書)|って(?:言|い)|という|わけでは"
        r"|ことは(?:ありません|ない))",
        spaced=False,
    )


def _korean() -> Phrases:
    return _phrases(
        r"잘|제대로|정확히|정확하게|너무|조금|좀|전혀|한번만?|조금만|천천히|크게|또박또박|분명히|명확하게",
        (
            r"못(?:알아)?(?:들었|들은|들어(?!봤|본)|듣겠|듣습)",
            r"(?:알아)?들을수(?:가)?없",
            r"(?:알아)?듣지(?:를)?못",
            r"(?:^|[^가-힣]|가|이|도|은|는)안들(?:려|립|리|렸|린)",
            r"들리지(?:가)?않",
            r"(?:말씀|질문)(?:을|를)?이해(?:를)?(?:하지)?못",
            r"(?:다시|더)(?:더|만)*(?:말씀|말|얘기|이야기|질문)(?:을|를)?(?:해|하여)?(?:주|줄|줘|달라|부탁)",
            r"(?:^|,)(?:뭐|무슨말씀이|무엇이)라고(?:하셨|말씀하셨|했|요)",
            r"(?:음성|녹음|오디오|목소리)(?:가|이|은|는)(?:많이)?(?:안들|들리지않|끊|불분명|명확하지않|작)",
        ),
        r"(?:그는|그녀는|그가|그녀가|친구가|사람이|만약|만일)[^,]*$",
        r"[가-힣]{0,3}?(?:다고|라고|냐고)(?:말|했|하|답|전|대답)|[가-힣]{0,2}?(?:다면|으면|을때|경우|을경우"
        r"|것은아)|던(?:것|게)아",
        spaced=False,
    )


def _spanish() -> Phrases:
    end = r"(?=$| ,| (?:pero|y|porque|debido|por (?:el|la|culpa)|ya que|a causa|en (?:el|la|tu|su))\b)"
    asked = (
        r"(?:(?:nada|lo que (?:has dicho|dijiste|ha dicho|dijo|dices|dice|me dices|me has dicho|preguntas"
        r"|preguntaste)|eso)"
        r"|(?:la|el|tu|su)(?: ultima)? (?:pregunta|audio|grabacion|mensaje|voz|final|parte)|que (?:dijiste|dijo"
        r"|has dicho))"
    )
    again = r"(?: (?:otra vez|de nuevo|una vez mas|nuevamente|mas (?:alto|claro|despacio|fuerte)))"
    ask = r"(?:puedes|podrias|puede|podria|pueden|podrian|te importaria|le importaria)(?: me)?"
    return _phrases(
        r"bien|muy|claramente|correctamente|por favor|lo siento|del todo|realmente|perdon|perdona|perdone"
        r"|disculpa|disculpe"
        r"|lamentablemente|"
        r"con claridad|todavia|aun",
        (
            r"\bno (?:te |le |lo |la |os |les |se )?(?:he )?(?:(?:podido|pude|puedo|logro|logre|consigo|consegui"
            r"|alcanzo a|alcance a) )?"
            r"(?:entendi|entiendo|entendido|entender|entenderte|entenderle|entenderlo|escuche|escucho|escuchado"
            r"|escuchar|escucharte|"
            r"escucharle|escucharlo|oi|oigo|oido|oir|oirte|oirle|oirlo|capte|captado|captar|comprendi|comprendido)"
            rf"(?: {asked})?{end}",
            rf"\bno se (?:escucha|oye|entiende|escucho|oyo|entendio)(?: {asked})?{end}",
            rf"\b{ask} (?:repetir|repetirlo|repetirla|repetirme|repetirmelo|repetimelo)(?: {asked})?{again}?{end}",
            rf"\b{ask} (?:decirlo|decirmelo|decir eso|volver a (?:decirlo|decirmelo|preguntar|preguntarlo)"
            rf"|hablar){again}",
            rf"(?:^|, )(?:me )?(?:lo )?(?:repite|repita|repitelo|repitalo|repitemelo|repitamelo|repites"
            rf"|puedes repetir)(?: {asked}){{0,1}}{again}?(?=$)",
            r"\b(?:el|tu|su|la) (?:audio|grabacion|sonido|voz) (?:es|esta|estaba|era|parece|suena"
            r"|se oye)(?: \w+){0,2} "
            r"(?:inaudible|cortad[oa]|entrecortad[oa]|vaci[oa]|incomplet[oa]|distorsionad[oa])",
            r"\b(?:audio|grabacion|sonido|voz) no (?:es|esta|estaba|era|suena|se oye|se escucha|se entiende)",
            r"^como has dicho$|^como dijo$|^como dijiste$|^como dices$|^que has dicho$",
        ),
        r"\b(?:si|cuando|aunque|no es que|dijo que|dice que|decir|digo que|significa|frases?|expresion|el|ella"
        r"|porque)(?: yo)? ?$"
        r"|\bpuedes (?:decir|preguntar|usar)(?: \S+){0,4} ?$|\bno (?:es necesario|hace falta"
        r"|necesitas)(?: \S+){0,3} ?$",
    )


def _french() -> Phrases:
    end = r"(?=$| ,| (?:mais|et|car|parce|a cause|en raison|dans (?:le|la|votre|ton|lenregistrement))\b)"
    asked = (
        r"(?:ce que (?:vous|tu) (?:avez dit|as dit|venez de dire|viens de dire|dites|dis|demandez|disiez"
        r"|mavez dit|mavez demande)|cela|ca"
        r"|(?:la|le|votre|ta|ton|vos|tes)(?: derniere)? (?:question|message|paroles|phrase|demande|enregistrement"
        r"|fin|voix|son|audio)"
        r"|laudio|lenregistrement|rien)"
    )
    ask = (
        r"(?:(?:pouvez|pourriez) vous|(?:peux|pourrais) tu|(?:vous|tu) (?:pouvez|pourriez|peux|pourrais)"
        r"|veuillez|merci de|puis je vous demander de)(?: me| le| la)*"
    )
    verb = r"(?:entendu|compris|entendre|comprendre|saisi|saisir|capte|capter|distinguer)"
    again = r"(?: (?:encore une fois|a nouveau|de nouveau|une fois de plus|plus (?:fort|lentement|clairement)))"
    return _phrases(
        r"bien|tres|vraiment|tout a fait|clairement|correctement|sil (?:vous|te) plait|svp|stp|desolee?"
        r"|malheureusement|"
        r"distinctement|excusez moi|pardon|encore(?! une)|completement",
        (
            rf"\bje (?:nai|ne (?:tai|vous ai|tai|lai|les ai)) (?:pas|rien|pas tout)(?: (?:pu|reussi a|su)(?: vous"
            rf"| te| le)?)? ?{verb}(?: {asked})?{end}",
            rf"\bjai (?:pas|rien|mal)(?: pu| reussi a)? {verb}(?: {asked})?{end}",
            rf"\bje (?:ne )?(?:narrive|parviens|peux|arrive|reussis) pas (?:a )?(?:vous |te |l"
            rf"|le )?{verb}(?: {asked})?{end}",
            rf"\bje (?:ne )?(?:vous |te |t|l)?(?:n)?entends (?:pas|rien|mal)(?: {asked})?{end}",
            rf"\bje (?:ne )?(?:vous |te )?comprends pas {asked}{end}",
            rf"\b{ask} (?:repeter|redire|reformuler|reposer|repetez)(?: {asked})?{again}?{end}",
            rf"(?:^|, )(?:repetez|repete)(?: {asked})?{again}?(?=$)",
            rf"\b{ask} parler plus (?:fort|lentement|clairement)",
            r"\b(?:laudio|lenregistrement|(?:le|votre|ton) (?:son|audio|enregistrement|message vocal)|(?:la|votre"
            r"|ta) voix) "
            r"(?:est|etait|semble|semblait|a ete)(?: \w+){0,2}? (?:inaudible|coupee?|vide|silencieux"
            r"|incomprehensible|incomplete?|brouillee?)",
            r"\b(?:laudio|lenregistrement|son|voix|audio|enregistrement) n(?:est|etait) pas (?:assez )?(?:clair"
            r"|claire|audible|comprehensible)",
            r"^comment$|^(?:vous|tu) dites?$|^quest ce que (?:vous avez|tu as) dit$",
        ),
        r"\b(?:si|quand|lorsque|parce que|dire que|dit que|dit|dire|ce nest pas que|non que|signifie|phrases?"
        r"|expression)(?: \S+){0,1} ?$"
        r"|\b(?:pouvez|peux) (?:dire|demander|repondre)(?: \S+){0,4} ?$",
    )


def _german() -> Phrases:
    thing = (
        r"(?: (?:sie|dich|euch|das|es|dies|ihre|deine|ihren|deinen|ihr|dein|die|den|der|frage|anfrage|aufnahme"
        r"|audio|nachricht|satz|"
        r"anliegen|gesagte|letzten?|letztes|teil|wort|worte|alles|davon|was (?:sie|du) (?:gesagt haben"
        r"|gesagt hast|sagten|sagtest|sagen|sagst)|,))*"
    )
    verb = r"(?:verstanden|gehort|verstehen|horen|mitbekommen|mitgekriegt|wahrnehmen)"
    once_more = r"(?: (?:noch ?mal|nochmals|noch einmal|erneut|lauter|langsamer|deutlicher))"
    ask = r"(?:konnen|konnten|konntest|kannst|wurden|wurdest|konntet) (?:sie|du|ihr)"
    me = r"(?: (?:mir|mich|fur mich))?"
    return _phrases(
        r"leider|bitte|richtig|ganz|gut|genau|akustisch|gerade|eben|deutlich|klar und|vollstandig|entschuldigung"
        r"|sorry|tut mir leid|so|"
        r"entschuldigen sie|verzeihung|wirklich|ja|wohl",
        (
            rf"\b(?:ich (?:habe|hab|konnte|kann)|(?:habe|hab|konnte|kann) ich){thing} (?:nicht|nichts|kaum"
            rf"|kein wort){thing} {verb}\b",
            rf"\bich (?:verstehe|hore){thing} (?:nicht|nichts|schlecht|kaum)(?=$| ,)",
            rf"\b{ask}{me}{thing}{once_more}?{thing} (?:wiederholen|neu formulieren)\b",
            rf"\b{ask}{me}{thing}{once_more}{thing} (?:sagen|stellen|sprechen|formulieren)\b",
            rf"(?:^|, )(?:wiederholen sie|wiederhole|wiederhol){me}{thing}{once_more}?(?=$)",
            rf"(?:^|, )(?:sagen sie|sag|sprechen sie|sprich|stellen sie|stell){me}{thing}{once_more}(?=$)",
            r"^wie$|^was (?:haben sie|hast du) gesagt$|^noch ?mal$|^noch einmal$",
            r"\b(?:die|ihre|deine|der|das|dein|ihr) (?:aufnahme|audio|audioaufnahme|ton|tonaufnahme"
            r"|stimme) (?:ist|war|scheint|klingt|wurde)"
            r"(?: \w+){0,2}? (?:unverstandlich|undeutlich|abgeschnitten|leer|stumm|unklar|abgebrochen"
            r"|unvollstandig|nicht (?:klar|verstandlich|zu (?:horen|verstehen)))",
        ),
        r"\b(?:wenn|falls|dass|weil|nicht dass|sagte|sagt|sagen|bedeutet|er|sie|satze?|ausdruck)(?: ,)? ?$"
        r"|\b(?:kannst|konnen) (?:du|sie) (?:sagen|fragen)(?: \S+){0,4} ?$",
        r" (?:heisst|bedeutet)\b",
    )


LANGUAGES: dict[str, Phrases] = {
    "en": _english(),
    "zh": _chinese(),
    "ja": _japanese(),
    "ko": _korean(),
    "es": _spanish(),
    "fr": _french(),
    "de": _german(),
}
"""By code; `zh` is Mandarin and Cantonese."""
