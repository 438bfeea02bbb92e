"""Common English words, the public source of random ones: short, neutral, of no record."""

COMMON = tuple(
    """
    able about above across again air all almost along also animal answer apple area arm around art away baby back bag ball bank
    base bath beach bear beautiful bed bell below best better big bird black blue boat body book border bottle bottom bowl box
    branch bread bridge bright broad brother brown brush build bus busy button cake call camera candle card carry cat center chain
    chair change cheap child church circle city class clean clear clock cloth cloud coat coffee cold color common cook copper corner
    cotton country cover cream cross cup curve cut dark day deep desk dinner door double down dream dress drink drive dry dust early
    earth east easy edge egg empty engine evening every exact eye face fair family far farm fast field fine finger fire fish flag
    flat floor flower fly fold food foot forest fork form frame free fresh friend front fruit full game garden glass gold good grain
    grass green ground group hair half hall hand happy hard hat heat heavy help high hill history hole holiday home honey hook horn
    horse hot hour house ice idea inside iron island jacket join juice jump keep key kind kitchen knee knife lake lamp land language
    large late laugh leaf leather left letter level library light line lip list little lock long loud low lunch machine map market
    meal metal middle milk minute mirror moon morning mountain mouth music nail narrow near neck needle new night noise north nose
    note number ocean office oil old open orange oven page paint pair paper park part path pen pencil picture piece pipe place plain
    plane plant plate play pocket point pool present purple question quick quiet rail rain red rest rice right ring river road rock
    roof room root rope round row rule sail salt sand school screen sea seat seed shade shelf ship shirt shoe short side silver
    simple sister size skin sky sleep slow small smile smoke smooth snow soap sock soft song sound soup south space spoon spring
    square stage stamp star station steam step stick stone store storm story street strong sugar summer sun sweet table tail tall
    taste thick thin thread ticket time tooth top touch town toy track train tree turn valley village voice wall warm watch water
    wave week west wheel white wide wind window wine winter wire wood wool word work yard year yellow young
    """.split()
)
