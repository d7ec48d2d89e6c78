"""How each type of parameter is written as text; ``cutaway.core.params`` names them for signatures."""
