"""Common English words, by which the gate tells English from what hides it.

Out of WordNet 3.0 (the words its sense-tagged corpus uses most), function words, and words of
today's computers and crimes. Ordinary inflections are built when the module is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable


def _with_forms(words: Iterable[str]) -> frozenset[str]:
    """Add plurals and the regular -ed and -ing forms; a form that no one uses does no harm."""
    known = set(words)
    for word in tuple(known):
        if len(word) < 3:
            continue
        doubled = word + word[-1]
        known |= {word + "s", word + "es", word + "ed", word + "ing", doubled + "ed"}
        known.add(doubled + "ing")
        if word[-1] == "e":
            known |= {word + "d", word[:-1] + "ing"}
        elif word[-1] == "y":
            known |= {word[:-1] + "ies", word[:-1] + "ied"}
    return frozenset(known)


WORDS = _with_forms(
    """
a abandon ability able abolish about above abroad abruptly absence absent absolute absolutely absorb
abstract abstraction absurd academic accelerate accept acceptance accident accommodate accompany
accomplish accord accordingly account accuracy accurate accurately accuse ace ache achieve
achievement acknowledge acquire acquisition acre across act action active activity actor actual
actually adapt add addition address adequate adhere adjust adjustment administer administration
administrative admiration admire admission admit adopt adult advance advantage adventure advertising
advice advise advocate aerated aerator aerosol aesthetic affair affect affection affirm affix afford
afraid after afternoon afterward again against age agency agent ago agony agree agreement ahead aid
aim air aircraft alarm albumin alert algorithm alive all allot allotment allow almost alone along
aloud already also alter alternate alternative although altogether alveolar always am amateur
amazement amazing ambiguous ambition ambitious amend american ammunition among amount ample an
anaconda analysis analyst analytic analyze anatomical anchor ancient and anger angle angry animal
anionic announce anode anonymous anonymously another answer antagonist antenna antibody anticipate
anticipation antigen antivirus anxiety any anybody anyhow anymore anyone anything anyway anywhere
apart apartment app apparatus apparent apparently appeal appear appearance applaud applause
applicant application apply appoint appointment appreciate appreciation apprehension apprentice
approach appropriate approval approve approximate approximately aqueous arbitrary arc architect are
area aren argue argument arise arm army around arouse arrange arrangement arrest arrival arrive
arrow art article artillery artist artistic as aside ask asleep aspect assault assemble assert
assess assign assignment assist assistance assistant associate association assume assumption
assurance assure at atmosphere atom attach attack attain attempt attend attention attitude attract
attraction attribute audience augment authentic author authority authorize automatic automatically
automobile autonomic available average avocado avoid await awake awaken award aware awareness away
awful awkward baby back backdoor background backward bacterial bad badly bag balance ball band bang
bank banker bar barely barn barrel barrier base baseball basement basic basis basket bat bath
battery battle bay be beach beam bear beard bearded beat beautiful beauty became because beckon
become bed bedroom bee beef been beer before beg began begin behave behavior behind being belief
believe bell bellow belly belong below belt bench bend beneath benefit beside best bet betray better
between beyond biblical bid big bigger bill bind binomial biological bird birth birthday bit bitcoin
bite bitter black blackmail blame blanket blast blaze bleed blend blind blink bloat block blog blood
bloody bloom blossom blow blue blush board boast boat body boil bold bolt bomb bomber bond bone book
boost boot border bore borrow boss both bother botnet bottle bottom bought bounce bound bow box boy
brain branch brand brass brave break breakfast breath breathe bridge brief briefly brigade bright
brightness brilliant bring bristle broad broaden broke broken bronchiole brood brother brought brow
brown browser brush bubble budget buffer build builder built bullet bully bumblebee bunch bundle
bunk burden burn burst bury bush business businessman busy but button buy buzz by bypass cafeteria
calculate calculation call calm calmly came camera camp campaign camper can cancel cancer candidate
cannon cannot canteen canvas cap capable capacity capital capitalism captain capture car care career
careful carefully carrier carry carve case cash cast casual cat catch catcher category cattle caught
cause caution cease ceiling celebrate cell cellar cent center central centrifuge century ceremony
certain certainly certify chain chair challenge chamber champion chance change chaos chapter
character characteristic characterize charge charm chart chase chat cheap check cheek cheer chemical
cherish chest chew chicken chief chiefly child childhood childish children chill chimney chin
chlorine choice choke choose chose chosen chronic chuckle church cigarette circle circumstance cite
citizen city civil civilian civilization claim clamor clarity class classic classical classification
classify clatter clay clean clear clearly clergyman clerk click client climb cling clinical clock
clone close closely cloth clothes cloud club clue clump cluster clutch coach coast coat code coffee
coin coincide cold collaborate collage collapse collect collection collective collector college
colonel colony color colorful column combat combination combine come comedy comfort comfortable
command commander commence commend comment commerce commercial commission commit committee common
commonly commotion communicate communication communism communist community commute companion company
comparable compare comparison compel compete competent competition competitive complain complement
complete completely complex complexity complicated comply component compose composer composite
composition compound comprehend comprehensive compress comprise compromise compulsive compulsivity
compute computer comrade conceal concede conceive concentrate concentration concept conception
concern conclude conclusion concrete condemn condition conduct conference confess confidence confine
confirm conflict confront confuse confusion congratulate congregation conjugate connect connection
conscience conscious consciousness consent consequence consequently conservative consider
considerable considerably consideration consistently conspiracy constant constituent constitute
construct construction consult consume consumer contact contain contemplate contemporary contempt
contend content contest context continually continue continuity continuous continuously contract
contrary contrast contribute contribution control convenient conventional conversation conversion
convert convey convict conviction convince cook cool cooperate cooperation cooperative coordinate
cop copy core corner corporal corporation corpse correct correlation correspond corridor cost
costume could couldn count counter counterfeit counterpart country county couple courage course
court cover cow cowboy crack cracker crash crawl crazy creak create creation creative creature
credential credit creep crest crew crime criminal crimson crisis critical criticism criticize crop
cross crouch crowd crude crush cry crypto culminate cultural culture cup curb cure curiosity curious
current curse curve customary customer cut cyber cyberattack cyberbullying cybersecurity cycle daily
damage damned dance danger dangerous dare dark darkness darknet dash data database date daughter
dawn day dead deaf deal dealer dear death debate debug debut decade decay decide decision decisive
deck declare decline decode decomposition decrease decrypt deduce deduct deduction deem deep
deepfake deeply defeat defend defense defensive define definite definitely definition defy degree
delay deliberately delicate delight delightful deliver demand democracy democratic demonstrate
demonstration denial denomination denote denounce density deny depart department departure depend
dependent depict deploy deposit depression depth deputy derive descend describe description desert
deserve design designate desirable desire desk despair desperate desperately destroy destruction
detail detect detectable detection detective detergent determination determine develop development
device devil devise devote diagonalizable dialysis diameter diarrhea dice dictate dictionary did
didn die differ difference different differently difficult difficulty diffusion dig dignity dilute
dimension diminish dimly din dinner direct direction directly director dirt dirty disable disagree
disappear disappointment disaster disc discharge discipline disclose discourage discover discovery
discriminate discrimination discuss discussion disease dish disinformation disk dislike dismiss
dispatch dispel display dispose dispute dissolve distal distance distant distinct distinction
distinctive distinguish distribute distribution district disturb disturbance dive divide division
divorce do doctor doctrine dodge does doesn dog doing dollar domestic dominant dominate don done
doom door doorway dot double doubt doubtful doubtless down download downtown dozen draft drag drama
dramatic draw drawn dream dress drew drift drill drink drip drive driven driver drop drove drug
drunk dry duck due dull duly dumb dump during dust duty dwell dwelling dwindle each eager ear
earlier early earn earth earthquake ease easily east eastern easy eat eaten eccentric echo economic
economical economy edge editor educate education educational educator effect effective effectively
effectiveness efficiency efficient effluent effort egg eight eighteen eighth either elaborate elbow
elect election electoral electric electrical electricity electron electronics element eleven
eliminate else elsewhere email embrace emerge emergency emotion emotional emphasis emphasize employ
employee employer employment empty enable enact encode encounter encourage encrypt end endeavor
endless endorse endure enemy energy enforce engage engagement engine engineer english enhance enjoy
enjoyment enlarge enlist enormous enough entail enter enterprise entertain enthusiasm enthusiastic
entire entirely entitle entity entrance entry envelope environment envy epidemic equal equally
equate equation equip equipment equivalent era erect error erupt escape escort especially essay
essential essentially establish establishment estate estimate etc etcetera eternal evaluate
evaluation even event eventually ever every everybody everyone everything everywhere evidence
evident evidently evil evoke exact exactly exaggerate examination examine example exceed excellent
exception excess exchange excite excitedly excitement exciting exclaim exclude excuse exercise exert
exhibit exhibition exist existence expand expansion expect expectation expedition expend expenditure
expense expensive experience experiment experimental expert explain explanation explode exploit
exploration explore explosion explosive expose exposure express expression extend extension
extensive extent external extract extraordinary extreme extremely eye fabric face facility fact
factor factory fade fail failure faint fair fairly faith fake fall fallen fallout false familiar
family famous fan fancy fantastic far farm farmer farther fashion fast fasten fat fatal fate father
fault favor favorite fear feature fed federal fee feed feel feet fell fellow felt female fence few
fewer fiber fiction fictional field fierce fifteen fifth fifty fig fight fighter figure file fill
film filter final finally finance financial find fine finger finish finite fire firearm firewall
firm firmly firmware first fish fist fit five fix flag flame flap flash flat flatness flee flesh
flew flexibility flight fling float flood floor flourish flow flower fluid fluorescence flush flux
fly focus foe fog fold folk folklore follow food fool foot football footstep for forbid force
forecast foreign foresee forest forever forget forgive forgot forgotten fork form formal formation
former formidable formula formulate formulation fortunate fortune forty forward foster fought found
foundation four fourteen fourth fraction frame frantic fraud fraudulent free freedom freely freeze
frequency frequent frequently fresh friend friendly frighten fringe from front frown fruit fulfill
full fully fun function fund fundamental funny fur furious furiously furnish furniture further
furthermore fury future gadget gain gallop game gang garage garden gas gasp gate gather gaunt gave
gay gaze general generally generate generation gentle gentleman gently genuine geometric gesture get
giant gift gigantic girl give given glad glance glare glass gleam glimpse gloom glory glow glue
gmail go goal god gold golden golf gone good google got gotten govern government governor grab grace
grade gradient gradually graduate gram grant graph grasp grass grateful grave gray great greater
greatly green greet grew grim grin grind grip groan gross grotesque ground group grow grown growth
grumble grunt guarantee guard guess guest guidance guide guideline guilt guilty gun guy gymnastics
habit hack hacker had hadn hail hair half halfback halfway hall halt hand handle handsome hang
happen happy harass harassment harbor hard hardly harm harmful harmony has hasn haste hasten hastily
hat hate hatred haul have haven having hay haze he head headquarters health healthy heap hear heard
heart heat heave heavily heavy heel height held helium help helpful helpless hen hence her herd here
heritage hero heroic herself hesitate hi hid hidden hide high higher highway hijack hill him himself
hint hire his historian historical history hit hold holder hole holiday home homely homer honest
honey honor hop hope horizon horn horror horse hospital host hostile hot hotel hour house how
however howl html http huddle hug huge human humor humorous hunch hundred hung hunger hungry hunting
hurl hurry hurt husband hut hypothalamic hypothalamus i ice idea ideal identical identification
identify identity idle if ignore ill illegal illegally illuminate illusion illustrate illustration
image imagination imagine imitation immediate immediately immigrant immortality impact implement
implication imply import importance important impose impossible impress impression impressive
improve improvement impulse impurity in inadequate inch incident include income incomplete increase
increasingly incredible incur indeed indefinite independence independent indicate indication
indicator indifferent indirect individual individualism induce industrial industry inevitable
inevitably infantry infection infectious infinite inflict influence inform information inherit
initial initially initiate initiative inject injection injure injury inner inning innocent inquire
inquiry insane insert inside insight insist insoluble inspect inspire install instance instant
instantly instead institute institution instruct instruction instrument insurance insure integrate
integration intelligent intend intense intensity intent intention interaction interest interfere
interior interlobular intermediate internal international internet interpret interpretation
interrupt intersection interval interview intimate into intonation introduce invade invariably
invent invention inventory invest investigate investigation investigator investment invite invoke
involve iodine iron is island isn isolate isolated issue it item its itself jacket jailbreak january
javascript jaw jerk job join joint joke journey joy judge judgment jump junior jury just justice
justify keep kept key keylogger kick kid kidney kill kind king kiss kitchen knee kneel knew knife
knives knock know knowledge known label labor laboratory lack lady lagoon laid lain lamp land
landscape language lap lapse large largely larger last late later latter laugh laughter launch
launder launderer law lawn lawyer lay layer lead leader leadership leaf league leak lean leap learn
least leather leave lecture led left leg legal legend legislation legislative lend length lent less
lesson let letter level liberal liberty license lick lie lieutenant life lift light lightly
lightning like likely likewise limit line linguist link linux lip liquid liquor list listen listener
lit literal literally literary literature little live liver lives load loan local locate location
lock log logical login lonely long longer look loom loose lose loss lost lot loud loudly love lovely
lover low lower loyalty luck lucky lunar lunch lung lurch lurid lurk lyric machine machinery mad
made magazine magnificent magnitude maid mail main mainly maintain major majority make male
malicious malware man manage management manager maneuver manifest manifestation manifold manipulate
manipulative manner manufacturer many map marble march mark market marketing marriage marry mass
massive master match mate material matter mature maturity maximum may maybe mayor me meal mean
meaningful meant meanwhile measure measurement mechanical mechanism medical medicine medieval medium
meet melody member membership memory men menace mental mention mere merely merge merit mess message
met metal meth method metropolitan mice micelle micrometeorite mid middle might mighty mile military
milk milligram million mimesis mind mine mineral mingle minimal minimize minimum minister minor
minute mirror misinformation miss missile mission mist mistake mistaken mix mixture mob mode model
moderate modern modernization modify molecule moment momentum monday money monitor monstrous month
mood moral morality more moreover morning morphophonemics most mostly mother motion motionless
motive motor mount mountain mouse mouth move movement movie much mud muddy muffled multiply
municipal murder murderer murmur muscle muscular muse music musical musician musket musketry must
mutter my myself mysterious mystery myth mythological nail name namely narrative narrow nation
national nationalism native natural naturally nature naval navy near nearby nearly neat necessarily
necessary necessitate necessity neck need negative neglect negotiate neighbor neighborhood neither
nerve nervous nest net network neutral never nevertheless new newly newspaper next nice night
nilpotent nine nineteenth ninth no nobody nod noise none nonspecific nor norm normal normally north
northern nose not note nothing notice notify notion novel now nowhere nuclear nucleus number
numerous oath obey object objection objective obligation oblige obscure observation observe observer
obstacle obtain obvious obviously occasion occasional occasionally occupation occupy occur
occurrence odd odor of off offer office officer official offline often oh oil ok old older ominous
omit on once one online only onset onto open openly opera operate operating operation operational
operator opinion opium opportunity oppose opposite opposition or orange orbit orchestra order
ordinarily ordinary organ organic organism organization organize origin original originate other
otherwise ought our ourselves out outcome outdoor outfit outline outlook output outside outstanding
over overall overcome overdose overhead overlook overwhelming owe own owner oxidation oxygen pace
pack page paid pain painful painfully paint painter pair pale panic pansy pant papa paper parallel
paramagnetic parasympathetic parent park parlor part participate participation particle particular
particularly partly partner party pass passage passion password past paste pastor pat patch path
patience patient patrol pattern pause pay payment peace peak peculiar peer pen penetrate people per
perceive percent percentage perception perfect perfectly perform performance perhaps period
permanent permit perpetuate persist persistent person personal personality personally personnel
persuade pertain petitioner phase phenomenon philosopher philosophical philosophy phishing phone
phonologic phosphate photo photograph phrase physical physics physiological piano pick picture piece
pile pink pipe piracy pirated pistol pitch pitcher pity place placement plain plainly plan plane
planet planetary plank plant plate play player plead pleasant please pleasure plenty plot plow plug
plunge pocket poem poet poetry point poison poke pole police policeman policy polish political
politician politics pollen polynomial pond ponder pool poor poorly pop popular population porch
porous port portion portray pose position positive positivist posse possess possession possibility
possible possibly post postpone posture pot potential pottery pound pour powder power powerful
practical practically practice praise pray prayer preach precede precious precipitate precise
precisely precision predict prefer preliminary preparation prepare presence present presentation
presently preserve president presidential press pressure prestige presumably presume pretend pretty
prevail prevent prevention previous previously price pride priest primarily primary prime primitive
principal principle print prior prisoner private privately privilege prize probability probable
probably probe problem procedure proceed process proclaim procurement produce producer product
production productive productivity profession professional professor profile profit profound program
progress project projection prominent promise promote prompt promptly proof proper properly property
proportion proposal propose proposition proprietor proprietorship prospect protect protection
protective protein protest proud prove provide provision provoke pseudo psychological psychologist
public publication publicly publish pull pump punish punishment pupil purchase pure purely purple
purpose purse pursuant pursue push put python quack qualification qualify quality quantity quarrel
quarter queen question quick quickly quiet quietly quit quite quiver quote rabbit race rack radar
radiation radical radio rag rage ragged rail railroad rain raise rally ran range rank ransomware
rapid rapidly rare rarely rate rather ratio rattle raw ray reach react reaction reactionary
reactivity read reader readily ready real realistic reality realize really rear reason reasonable
reasonably rebel rebellion recall receive receiver recent recently reception recipe reckon
recognition recognize recommend recommendation record recount recover recreation recruit red redcoat
reduce reduction refer reference reflect reflection refund refuse regard regardless regiment region
regional register regret regular regulate regulation rehabilitation reinforce reject relate relation
relationship relative relatively relax release relevant reliable relief relieve religion religious
relinquish remain remark remarkable remarkably remember remind remote removal remove render renew
rent repair repeat repeatedly repel repetition replace replacement reply report reporter represent
representation representative reproach reproduce reputation request require requirement rescue
research resemble resent reserve reside residence resident residential resign resist resistance
resolution resolve resonance resource respect respectable respectively respiratory respond response
responsibility responsible rest restore restrain restrict result resume retention retire retirement
retreat retrieve return reveal revenge reverse review revise revive revolution reward rewrite rhythm
rice rich ridden ride rider rifle right rigid ring rip rise risen risk ritual river road roadway
roar rob robot rock rode role roleplaying roll romantic roof room root rootkit rose rotate rough
roughly round route routine row rub rugged ruin rule rumor run rural rush rustle sabotage sacrifice
sad saddle sadly safe safety said sail sake salary sale salesman saline salt salvation same sample
sanction sand sang sank sat satisfaction satisfactory satisfy savagely save saw say scale scam scan
scar scarcely scatter scene schedule scheme scholarship school scientific scope score scorn scramble
scrape scratch scream screen script sculpture sea seal search season seat secede second secondary
secret secretary section sector secure security see seek seem seemingly seen seize seldom select
selection self sell selves send sensation sense sensitive sensitivity sent sentence sentiment
separate separation sequence sergeant series serious seriously serum servant serve server service
session set settle settlement settler seven seventeen several severe severely sewage shade shadow
shake shaken shall shame shape share sharp sharply shatter shave she shear sheep sheer sheet shell
shelter shield shift shine ship shirt shiver shock shoe shook shoot shop shoplift shore short
shorten shortly shot should shoulder shouldn shout shove show shower shown shriek shrill shrug
shudder shut shutter sick side sidewalk sigh sight sign signal significance significant
significantly silence silent silly silver similar similarity similarly simple simply simultaneously
sin since sing single sink sip sir sister sit site situation six sixth size skeletal sketch skill
skin skip skirt sky slam slap slash slaughter slave slavery sleep slender slept slice slide slightly
slip slope slow slowly slug small smaller smart smartphone smash smell smile smoke smooth smuggle
snake snap snarl snatch snow so soap sober social socialism society soft softly software soil sold
soldier solely solid solution solve some somebody someday somehow someone something sometimes
somewhat somewhere son song soon sophisticated sore sort soul sound source south southern sovereign
space spam span spare spark spatial speak speaker special specialist species specific specifically
specify spectacle spectator spectrum speculate speech speed spell spend spent sphere spin spiral
spirit spiritual spit split spoke spoken sponsor spontaneous spoof sport spot sprawl spray spread
spring spur spyware squad square squat squeeze stable staff stage stagger stain staining stairs
stake stalk stall stamp stand standard star stare start startle startling state statement station
status stay steady steal steel steeple stem step stereotype stern stick stiffen still stimulate
stimulus stir stock stockholder stole stolen stomach stone stood stoop stop storage store storm
story straight straighten strain strange stranger strategy straw stream street strength strengthen
stress stretch strictly stride strike string strip strive stroke strong strongly struck structural
structure struggle stuck student studio study stuff stumble stupid sturdy style subject subjective
submit subsection substance substantial substantially substitute subtle subtract suburb suburban
succeed success successful successfully such sudden suddenly suffer sufficient sufficiently suggest
suggestion suicide suit suitcase sullen sum summarize summer summon sun sunday sung superior
superstition supervise supper supplement supply support suppose supreme sure surely surface surge
surgeon surplus surprise surrender surround surrounding survey survival survive suspect suspend
suspicion sustain swallow sway swear sweat sweep sweet swell swift swiftly swim swing switch swoop
sword swore syllable symbol symbolize sympathetic sympathy symptom system table tag tail take taken
tale talent talk tall tangent tank tap tape target task taste tattered taught tax taxpayer teach
teacher team tear technical technique technological technology teenager teeth telephone television
tell temperature tempt temptation ten tend tendency tender tension tent term terminate terrible
terribly terror terrorism terrorist test testify testimony text texture than thank that the theater
theatre their them theme themselves then theologian theological theology theorem theoretical theory
therapeutic therapist there thereafter thereby therefore thereof thermal thermometer these they
thick thicket thief thigh thin think third thirty this thoroughly those though thought thoughtfully
thousand thread threat threaten three threshold threw thrill throat through throughout throw thrown
thrust thunder thus thyroglobulin thyroid thyroxine tie tight tighten till tilt time tiny tip tire
tissue title to toast today toe together told tomorrow ton tone tongue tonight too took tool tooth
top torn torrent toss total totally touch tough toward town toxin trace track trade tradition
traditional traffic trafficking tragedy tragic trail train training tramp transducer transfer
transform transition translate translation transmit transport transportation trap travel tray tread
treasury treat treatment tree trembling tremendous trend trial trigger trim trip triple triumph
trojan troop trooper troops trot trouble truck true truly trust truth try tsunami tube tug tumble
tumor tune turn tutorial twelve twentieth twenty twice twist two type typical ultimate ultrasonic
unable unadjusted unaware uncertain uncertainty unconscious under understand understood undertake
underway undetected undoubtedly uneasy unethical unfortunate unfortunately uniform union unique unit
unite unity universal universe university unknown unless unlikely unmolested unspeakable
unstructured until untraceable unusual up uphold upon upper upset upstairs upward urge us usage use
useful user username usual usually utility utilize utopian utter utterly vacation vacuum vague
vaguely valley valuable value vandalism vandalize vanish variable variation variety various vary
vase vast vector vehicle vein velocity venture verb verbal verify version vertex vertical very
vessel veteran via victim victory video view viewpoint vigorous village violate violation violence
violent virtually virtue virus viscosity visible vision visit visual vitality vivid vocabulary
vocational voice volley voltage volume volunteer vote voyage vulnerability vulnerable wage wagon
wail wait wake walk wall wander want war warfare warm warn warrant was wash wasn waste watch water
watercolor wave wavelength wax way we weak weaken weakness wealth weapon wear weary weather website
week weekend weep weigh weight weird welcome well went were weren west western wet what whatever
wheel when whenever where wherever whether which while whip whirl whisky whisper whistle white who
whoever whole wholly whom whose why wide widely widen widespread wife wifi wild wildly will win wind
window windows wine wing wink winter wipe wire wisdom wise wish wit with withdraw withhold within
without witness wives woke woman women won wonder wonderful wood wooden woods word wore work worker
world worm worn worry worse worship worst worth worthy would wouldn wound wrap wreck wrist write
writer written wrong wrote yard year yell yellow yes yesterday yet yield you young your yourself
yourselves youth youthful zero
""".split()  # noqa: SIM905 - a list literal would be ten times as long
)
